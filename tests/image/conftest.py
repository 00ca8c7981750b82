"""What the tests of the image share: an encrypted model, and one container that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import podman

from tensorserve.cli import main as tensorserve


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The encrypted model and its key, readable by whatever user the container has."""
    base = tmp_path_factory.mktemp("bundle")
    words = ["pack", str(model_dir), str(base / "model"), "--encrypt"]
    assert tensorserve([*words, "--key-file", str(base / "key")]) == 0
    (base / "key").chmod(0o444)
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
