"""The services that these tests ask, each started once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from key_services import Kms, OpenBao, moto_server, openbao
from tensorserve.sources import retry


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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of waiting, from the first failure on."""
    monkeypatch.setattr(retry, "DEFAULTS", replace(retry.DEFAULTS, told_after=0.0))
    monkeypatch.setattr(retry, "_turns", retry._Turns())
    said: list[str] = []
    monkeypatch.setattr(retry._log, "warning", lambda text, *values: said.append(text % values))
    return said
