"""What tests of several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A configured environment; gives the state directory."""
    monkeypatch.setenv("TENSORSERVE_MODEL_URI", "/models/m")
    monkeypatch.setenv("TENSORSERVE_STATE_DIR", str(tmp_path))
    return tmp_path
