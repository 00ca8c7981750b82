"""Attack: a LoRA adapter is exchanged for another one of the same owner, or for an older one."""

from __future__ import annotations

from pathlib import Path

import pytest
from forging import downgrade, exchange, rewrite
from starting import refused
from victims import Store, make_adapter, make_bundle

from tensorserve.packing.lora import read_adapters

FILES = [Path("adapters") / name / "adapter_model.tensors" for name in ("polite", "rude")]


@pytest.fixture
def with_adapters(tmp_path: Path) -> Path:
    """A bundle with two adapters."""
    given = [
        f"{p.parent.name}={make_adapter(tmp_path / p.parent.name, n)}" for n, p in enumerate(FILES)
    ]
    return make_bundle(tmp_path / "with", adapters=read_adapters(given))


def test_for_each_other(tmp_path: Path, with_adapters: Path, store: Store) -> None:
    """Both are authentic; only the manifest says which is which."""
    exchange(with_adapters / FILES[0], with_adapters / FILES[1])
    assert "are not those of the manifest" in refused(tmp_path, store.put(with_adapters))


def test_with_the_manifest_made_to_fit(tmp_path: Path, with_adapters: Path, store: Store) -> None:
    """Its MAC cannot be."""
    exchange(with_adapters / FILES[0], with_adapters / FILES[1])
    rewrite(with_adapters)
    assert "somebody without the key" in refused(tmp_path, store.put(with_adapters))


def test_with_a_manifest_of_version_1(tmp_path: Path, with_adapters: Path, store: Store) -> None:
    """It authenticates nothing."""
    exchange(with_adapters / FILES[0], with_adapters / FILES[1])
    rewrite(with_adapters, downgrade)
    assert "neither an authenticated manifest" in refused(tmp_path, store.put(with_adapters))
