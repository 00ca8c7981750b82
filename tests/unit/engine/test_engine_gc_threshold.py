"""Garbage is looked for less often while vLLM imports, and as usual afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorserve import vllm_plugin
from tensorserve.engine import gc_threshold
from tensorserve.launch.serve import PROGRAM


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    """Python's own numbers."""
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_it_ends_with_the_plugin_that_vllm_calls(usual: tuple[int, int, int]) -> None:
    """Twice each: vLLM may call it more than once, and a fork has begun it already."""
    gc_threshold.rarely_collect()
    gc_threshold.rarely_collect()
    assert gc.get_threshold() == (10_000_000, *usual[1:])
    assert gc.isenabled()
    vllm_plugin.register()
    assert gc.get_threshold() == usual
    vllm_plugin.register()
    assert gc.get_threshold() == usual


def test_who_chose_other_numbers_keeps_them() -> None:
    """Where nobody put it off, nothing is set; a larger number stays."""
    gc.set_threshold(1234, 5, 6)
    gc_threshold.collect_as_usual()
    assert gc.get_threshold() == (1234, 5, 6)
    gc.set_threshold(90_000_000, 5, 6)
    gc_threshold.rarely_collect()
    assert gc.get_threshold() == (90_000_000, 5, 6)
    gc_threshold.collect_as_usual()
    assert gc.get_threshold() == (90_000_000, 5, 6)


def test_the_program_begins_with_it(tmp_path: Path) -> None:
    """Before anything of vLLM is imported: a vLLM of ours says what it saw."""
    program = (
        "import gc, runpy, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'vllm':\n"
        "            print(gc.get_threshold()[0])\n"
        "            raise SystemExit(0)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.split() == ["10000000"]
