"""Attack: manifest.json is deleted, so that nothing is compared any more."""

from __future__ import annotations

from pathlib import Path

from forging import MANIFEST
from starting import refused
from victims import Store


def test_from_a_bundle_of_ours(tmp_path: Path, bundle: Path, store: Store, disk: Store) -> None:
    """With it go the digests; nothing is left that says which tensor is which."""
    (bundle / MANIFEST).unlink()
    for place in (store, disk):
        said = refused(tmp_path, place.put(bundle))
        assert "neither an authenticated manifest.json nor a SHA-256" in said
        assert "tensorserve sign" in said
