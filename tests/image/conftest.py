"""What the tests of the image share: an encrypted model, and one container that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import USER, podman

from tensorserve.cli import main as tensorserve


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The encrypted model, and its key as `pack` writes it: readable by USER alone."""
    base = tmp_path_factory.mktemp("bundle")
    words = ["pack", str(model_dir), str(base / "model"), "--encrypt"]
    assert tensorserve([*words, "--key-file", str(base / "key")]) == 0
    os.chown(base / "key", USER, 0)
    assert (base / "key").stat().st_mode & 0o777 == 0o600
    for path in (base, *base.parents[:2]):
        path.chmod(0o755)
    return base


@pytest.fixture(scope="module")
def cache_volume() -> Iterator[str]:
    """A volume for what is compiled; empty at first, gone at the end."""
    name = "tensorserve-test-cache"
    podman("volume", "rm", "--force", name)
    yield name
    podman("volume", "rm", "--force", name)
