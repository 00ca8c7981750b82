"""What all tests share: a real S3 server and the real small model, made once a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3server import S3Server


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say last what this processor cannot run: it is not to be taken for tested."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    count = sum("no AVX-512 IFMA" in str(report.longrepr) for report in reports)
    if count:
        terminalreporter.section("NOT TESTED: our own cipher (crypto/secretbox.c)", yellow=True)
        terminalreporter.line(
            f"{count} tests were skipped: this processor has no AVX-512 IFMA. On one that has it "
            "they run, and fail if the library was not built."
        )


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Imports are no garbage: with vLLM, each full collection would look at 650,000 objects."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """With TEST_TRANSPORT=urllib3, sources do without libcurl (`make test-fallback`)."""
    if os.environ.get("TEST_TRANSPORT") == "urllib3":
        from tensorserve.sources import http

        http.curl = lambda: None


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
