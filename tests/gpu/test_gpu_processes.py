"""What a process of its own is needed for: contexts on other GPUs, and compute-sanitizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_files import Files, smallest, write

HERE = Path(__file__).parent
_SECONDS = 200
_SANITIZERS = ("usr/local/cuda*/bin/compute-sanitizer", "opt/nvidia/*/compute-sanitizer")


def test_no_context_on_another_gpu(gpu: torch.device, files: Files) -> None:
    """Each thread that touches CUDA sets its device first; else it makes one on the first GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"only one GPU here ({gpu}): contexts on another one need two")
    paths = [str(files.path("sizes", chunk)) for chunk in ("plain", "2MiB", "64MiB")]
    words = [sys.executable, str(HERE / "other_gpus.py"), *paths]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_smallest_load(device: torch.device, tmp_path: Path) -> None:
    """In a process of its own, as compute-sanitizer is given it."""
    _smallest([], device, tmp_path)


# Last: it takes longest.
@pytest.mark.timeout(300)
def test_the_smallest_load_under_compute_sanitizer(gpu: torch.device, tmp_path: Path) -> None:
    """No access outside of what was allocated, by any copy or kernel."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(found) for pattern in _SANITIZERS for found in sorted(Path("/").glob(pattern))), None
    )
    if tool is None:
        pytest.skip("compute-sanitizer is not on this machine (CUDA's toolkit brings it)")
    _smallest([tool, "--tool", "memcheck", "--error-exitcode", "9"], gpu, tmp_path)


def _smallest(under: list[str], device: torch.device, directory: Path) -> None:
    path = directory / "smallest.tensors"
    write(path, smallest(), "2MiB")
    words = [*under, sys.executable, str(HERE / "smallest_load.py"), str(path), str(device)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        if not under:
            raise
        pytest.skip(f"compute-sanitizer was not done in {_SECONDS} s")
    if under and "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's GPU (a virtual one?)")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
