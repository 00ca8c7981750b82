"""Attack: manifest.json is deleted, so that nothing is compared any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from forging import MANIFEST, nothing_sealed
from starting import refused
from victims import Store


@pytest.mark.parametrize("once", ["auto", "off"])
def test_from_a_bundle_of_ours(
    tmp_path: Path, bundle: Path, store: Store, disk: Store, once: str
) -> None:
    """With it go the digests; nothing is left that says which tensor is which. Where vLLM is
    imported beside the checks, it ends with them."""
    (bundle / MANIFEST).unlink()
    for place in (store, disk):
        said = refused(tmp_path, place.put(bundle) | {"TENSORSERVE_IMPORT_ONCE": once})
        assert "neither an authenticated manifest.json nor a SHA-256" in said
        assert "tensorserve sign" in said


def test_with_a_file_in_which_nothing_is_sealed(tmp_path: Path, bundle: Path, disk: Store) -> None:
    """vLLM would be started with whatever configuration and code stand beside it."""
    (bundle / MANIFEST).unlink()
    (bundle / "model.tensors").write_bytes(nothing_sealed("model.rotary_emb.inv_freq"))
    assert "nothing that the key" in refused(tmp_path, disk.put(bundle))
