"""What the parent of vLLM makes of its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorserve.telemetry import events_path, fold, read_events

# The real parent around a stand-in for vLLM: a process that ends as told.
PROGRAM = """
import os, sys
from tensorserve.engine import run_engine
from tensorserve.settings import HANDOFF_VARIABLE, Settings
from tensorserve.start import publish_start

environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": sys.argv[1]}
os.environ[HANDOFF_VARIABLE] = publish_start(environ, Settings.from_environment(environ), ())
code = int(sys.argv[2])
sys.exit(run_engine(lambda: os.kill(os.getpid(), -code) or 0 if code < 0 else code))
"""


@pytest.mark.parametrize(
    ("ended", "code", "failed"),
    [
        pytest.param(3, 3, True, id="vllm's own code"),
        pytest.param(0, 1, True, id="in order, but nobody had asked: its engine had died"),
        pytest.param(-9, 137, True, id="killed"),
    ],
)
def test_the_recorded_code(tmp_path: Path, ended: int, code: int, failed: bool) -> None:
    """An end that nobody asked for is a failure, whatever vLLM's code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(ended)],
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == code
    state = fold(read_events(events_path(tmp_path)))
    assert state.engine_exit == code
    assert (state.failure is not None) == failed
