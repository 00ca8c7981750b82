"""Attack: weights that are not encrypted, anybody's, take the place of the sealed ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forging import MANIFEST
from starting import refused
from victims import Store, make_bundle


@pytest.mark.parametrize("manifest", ["as it was", "of the plain bundle", "none"])
def test_a_plain_file(tmp_path: Path, bundle: Path, store: Store, manifest: str) -> None:
    """The key says that they must be sealed; without one nobody could have vouched for them."""
    plain = make_bundle(tmp_path / "plain", seed=2, key=None)
    shutil.copy(plain / "model.tensors", bundle / "model.tensors")
    if manifest == "of the plain bundle":
        shutil.copy(plain / MANIFEST, bundle / MANIFEST)
    elif manifest == "none":
        (bundle / MANIFEST).unlink()
    said = refused(tmp_path, store.put(bundle), code=78)
    assert "is not encrypted, but a key is given" in said
