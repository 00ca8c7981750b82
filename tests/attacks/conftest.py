"""A bundle to attack, and the two places where it may be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from s3server import S3Server
from victims import BUCKET, Store, make_bundle


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encrypted bundle that is not touched."""
    return make_bundle(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(packed, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def store(s3: S3Server, tmp_path: Path) -> Store:
    """A bucket: where an attacker is most likely to write."""
    s3.make_bucket(BUCKET)
    return Store(s3, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    """A directory."""
    return Store(None, tmp_path)
