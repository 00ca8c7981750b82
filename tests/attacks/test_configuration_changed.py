"""Attack: configuration or tokenizer is changed: it decides what the model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forging import downgrade, rewrite
from starting import refused, start
from victims import Store


def soften(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 1.0}))


def same_size(path: Path) -> None:
    path.write_text(path.read_text().replace("llama", "llbma"))


@pytest.mark.parametrize("change", [soften, same_size])
def test_config_json(tmp_path: Path, bundle: Path, store: Store, change: object) -> None:
    """Of another size, or of the same."""
    change(bundle / "config.json")  # type: ignore[operator]
    said = refused(tmp_path, store.put(bundle))
    assert "config.json" in said


def test_the_headers_that_tell_what_is_quantized(
    tmp_path: Path, bundle: Path, store: Store
) -> None:
    """They decide the dtype too; of another size, or gone."""
    path = bundle / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    assert "model.safetensors" in refused(tmp_path, store.put(bundle))
    path.unlink()
    assert "model.safetensors does not exist" in refused(tmp_path, store.put(bundle))


def test_a_planted_header_is_not_given_to_vllm(tmp_path: Path, bundle: Path, store: Store) -> None:
    """By its name alone it would make another kind of model of the bundle."""
    (bundle / "consolidated.safetensors").write_bytes((bundle / "model.safetensors").read_bytes())
    ended = start(tmp_path, store.put(bundle))
    assert ended.code is None, ended.text
    assert not (ended.model_dir / "consolidated.safetensors").exists()


def test_the_tokenizer_is_gone(tmp_path: Path, bundle: Path, store: Store) -> None:
    """vLLM would make up another."""
    (bundle / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in refused(tmp_path, store.put(bundle))


@pytest.mark.parametrize("version", [1, 2])
def test_with_the_manifest_made_to_fit(
    tmp_path: Path, bundle: Path, store: Store, version: int
) -> None:
    """Its MAC cannot be; and version 1 authenticates nothing."""
    soften(bundle / "config.json")
    rewrite(bundle, downgrade if version == 1 else lambda _: None)
    refused(tmp_path, store.put(bundle))
