"""What the tests for a GPU share: which device they run on, and files for all of them.

GPU_TESTS_DEVICE=cpu runs all that can run without a GPU: the tests themselves are then tried.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gpu_files import Files


@pytest.fixture(scope="session")
def device() -> torch.device:
    """GPU_TESTS_DEVICE, else the current GPU."""
    named = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if named != "cpu" and not torch.cuda.is_available():
        pytest.skip(
            f"torch {torch.__version__} sees no GPU (GPU_TESTS_DEVICE=cpu runs what it can on CPU)"
        )
    if named == "cpu":
        return torch.device("cpu")
    index = torch.device(named).index
    if index is not None:
        torch.cuda.set_device(index)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """For a test that shows nothing without a GPU."""
    if device.type == "cpu":
        pytest.skip("shows something on a GPU only, and these tests run on CPU")
    return device


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Each file is written once, by tensorizer."""
    directory: Path = tmp_path_factory.mktemp("files")
    return Files(directory)
