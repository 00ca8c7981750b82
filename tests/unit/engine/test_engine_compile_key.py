"""vLLM's key of compiled code knows no state directory, and knows the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with vLLM's own method until `adapt_key` is called."""
    # Its import adapts the key where another test has had vLLM call our plugin.
    import vllm.compilation.decorators  # noqa: F401
    from vllm.config import ModelConfig

    from tensorserve.engine import compile_key

    own = ModelConfig.compute_hash
    monkeypatch.setattr(ModelConfig, "compute_hash", getattr(own, "__wrapped__", own))
    monkeypatch.setattr(compile_key, "_served", set())
    return compile_key


def hash_of(model: str) -> str:
    """The key of vLLM's ModelConfig, made without looking for the model."""
    from vllm.config import ModelConfig

    config = object.__new__(ModelConfig)
    config.model = model
    text: str = config.compute_hash()
    assert config.model == model
    return text


def test_vllm_hashes_the_path_and_no_processor(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this holds, the adaptation is needed; else compile_key.py says what can go."""
    monkeypatch.setattr(key, "processor_flags", lambda: ("avx2",))
    before = hash_of("/a")
    monkeypatch.setattr(key, "processor_flags", lambda: ("avx512f",))

    assert hash_of("/a") == before
    assert hash_of("/b") != before


def test_served_directories_have_one_key(key: Any) -> None:
    """And a draft in them has another one, the same for all."""
    key.leave_out_of_key(Path("/a/model"))
    key.leave_out_of_key(Path("/b/model"))

    assert key.adapt_key()
    assert hash_of("/a/model") == hash_of("/b/model")
    assert hash_of("/a/model/draft/x") == hash_of("/b/model/draft/x")
    assert hash_of("/a/model/draft/x") != hash_of("/a/model/draft/y")


def test_other_directories_keep_theirs(key: Any) -> None:
    """Of models that we do not serve; a common beginning of the names is not enough."""
    key.leave_out_of_key(Path("/a/model"))

    assert key.adapt_key()
    assert len({hash_of(path) for path in ("/a/model", "/a/model-2", "/a", "org/model")}) == 4


def test_another_processor_has_another_key(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for its vector width must not be loaded elsewhere."""
    assert key.adapt_key()
    monkeypatch.setattr(key, "processor_flags", lambda: ("avx2",))
    before = hash_of("/a")
    monkeypatch.setattr(key, "processor_flags", lambda: ("avx2", "avx512f"))

    assert hash_of("/a") != before


def test_a_gpu_build_hashes_its_device_itself(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the processor does not matter."""
    import vllm.platforms

    stock = hash_of("/a")
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cpu", lambda: False)

    assert key.adapt_key()
    assert hash_of("/a") == stock


def test_the_method_is_changed_once(key: Any) -> None:
    """vLLM may call the plugin several times."""
    from vllm.config import ModelConfig

    assert key.adapt_key()
    once = ModelConfig.compute_hash
    assert key.adapt_key()
    assert ModelConfig.compute_hash is once


def test_an_unknown_method_is_left_alone(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another version of vLLM."""
    from vllm.config import ModelConfig

    def compute_hash(config: Any, include_version: bool) -> str:
        return f"{config} {include_version}"

    monkeypatch.setattr(ModelConfig, "compute_hash", compute_hash)

    assert not key.adapt_key()
    assert ModelConfig.compute_hash is compute_hash
