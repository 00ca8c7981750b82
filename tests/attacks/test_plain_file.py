"""Attack: weights that are not encrypted, anybody's, take the place of the sealed ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from forging import MANIFEST, index_of
from loads import load
from starting import refused
from victims import Store, make_bundle

from tensorserve.errors import CorruptError


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


@pytest.mark.parametrize("wish", ["auto", "manifest", "tags"])
def test_data_of_a_pinned_plain_bundle_changed(tmp_path: Path, wish: str) -> None:
    """It has no tags: the digests alone say that the data are those of the pin."""
    plain = make_bundle(tmp_path / "plain", key=None)
    pin = hashlib.sha256((plain / MANIFEST).read_bytes()).hexdigest()
    environ = {
        "TENSORSERVE_MODEL_URI": str(plain),
        "TENSORSERVE_MANIFEST_SHA256": pin,
        "TENSORSERVE_VERIFY": wish,
    }
    assert len(load(environ)) == 4
    path = plain / "model.tensors"
    data = bytearray(path.read_bytes())
    data[index_of(path).tensors[0].data_offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError):
        load(environ)
