"""Which vLLM is installed."""

from __future__ import annotations

import pytest

from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight import check_vllm, vllm_build


def test_another_version_of_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader knows vLLM's internals: it is made for one version."""
    monkeypatch.setattr(vllm_build, "vllm_version", lambda: "0.33.0+cpu")
    with pytest.raises(ConfigurationError, match=r"0\.33\.0\+cpu is installed"):
        check_vllm()
