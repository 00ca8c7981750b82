"""The services that these tests ask, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from key_services import Kms, OpenBao, moto_server, openbao


@pytest.fixture(scope="session")
def bao() -> Iterator[OpenBao]:
    """A real OpenBao; a test that seals it unseals it."""
    with openbao() as server:
        yield server


@pytest.fixture(scope="session")
def kms() -> Iterator[Kms]:
    """moto's stand-in for AWS KMS."""
    with moto_server() as server:
        yield server
