"""What all tests share: a real S3 server and the real small model, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3server import S3Server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def bucket(s3: S3Server) -> str:
    """A bucket that exists."""
    s3.make_bucket("models")
    return "models"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, kept between sessions."""
    from smollm2 import ensure_model

    return ensure_model()
