"""The cuda image's lock holds one CUDA toolkit: compiler, headers, libraries of one release.

nvcc refuses headers of another release than its own, so a mixture fails at the first kernel that is
compiled while serving; nothing that is installed from wheels notices before.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LOCK = Path(__file__).parents[3] / "docker/requirements-cuda.lock"
# Parts of the toolkit whose distributions do not carry CUDA in their names.
PARTS = {"nvidia-nvvm", "nvidia-nvjitlink", "nvidia-nvtx"}
# What nvcc is made of, and what it reads while it compiles and links.
COMPILER = {
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-cccl",
    "nvidia-cuda-runtime",
    "nvidia-cuda-nvrtc",
}


def versions(lock: str) -> dict[str, str]:
    """The version of every package that a lock names."""
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", lock, re.MULTILINE))


def strangers(locked: dict[str, str]) -> dict[str, str]:
    """The parts of the toolkit that are not of the release which torch is built with."""
    release = ".".join(locked["cuda-toolkit"].split(".")[:2])
    return {
        name: version
        for name, version in locked.items()
        if (name.startswith("nvidia-cuda-") or name in PARTS)
        and not version.startswith(f"{release}.")
    }


def test_every_part_of_the_cuda_toolkit_is_of_torchs_release() -> None:
    locked = versions(LOCK.read_text())

    assert locked.keys() >= COMPILER | PARTS
    assert strangers(locked) == {}


@pytest.mark.parametrize("name", sorted(COMPILER | PARTS))
def test_a_part_of_another_release_is_found(name: str) -> None:
    locked = versions(LOCK.read_text()) | {name: "13.5.37"}

    assert strangers(locked) == {name: "13.5.37"}
