"""The list of vLLM's flags that we keep is that of the installed vLLM."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tensorserve.config.vllm_flags import FLAGS_FILE

MAKE = Path(__file__).parents[3] / "docs" / "make_vllm_flags.py"


def test_the_kept_flags_are_those_of_the_installed_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from vLLM's own parser, which other tests of this process import as well."""
    monkeypatch.setattr(sys, "argv", [str(MAKE)])
    runpy.run_path(str(MAKE), run_name="__main__")
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == json.loads(FLAGS_FILE.read_text())
