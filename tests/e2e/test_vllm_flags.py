"""The list of vLLM's flags that we keep is that of the installed vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

from tensorserve.vllm_flags import FLAGS_FILE


def test_the_kept_flags_are_those_of_the_installed_vllm() -> None:
    """Read from vLLM's own parser, in a process of its own (it imports torch and more)."""
    done = subprocess.run(
        [sys.executable, "-m", "tensorserve.vllm_flags"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout[done.stdout.index("{") :]) == json.loads(FLAGS_FILE.read_text())
