"""Attack: an older bundle of the same owner, complete and sealed with the same key, is put back."""

from __future__ import annotations

import hashlib
from pathlib import Path

from forging import MANIFEST
from starting import command, refused, start
from victims import Store, make_bundle


def test_the_whole_of_it(tmp_path: Path, bundle: Path, store: Store) -> None:
    """Without a pin it is the owner's own and is served; with one it is another bundle."""
    pin = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    older = make_bundle(tmp_path / "older", seed=2)
    environ = store.put(older)
    assert start(tmp_path, environ).code is None
    said = refused(tmp_path, environ | {"TENSORSERVE_MANIFEST_SHA256": pin})
    assert "TENSORSERVE_MANIFEST_SHA256 is" in said


def test_with_the_manifest_deleted_on_top(tmp_path: Path, bundle: Path, store: Store) -> None:
    """A pin asks for a manifest."""
    environ = store.put(bundle)
    uri = environ["TENSORSERVE_MODEL_URI"]
    code, said = command("verify", environ, uri)
    assert code == 0
    pin = said.rpartition("SHA-256 ")[2].split()[0]
    environ["TENSORSERVE_MANIFEST_SHA256"] = pin
    assert start(tmp_path, environ).code is None
    (bundle / MANIFEST).unlink()
    environ |= store.put(bundle)
    assert "TENSORSERVE_MANIFEST_SHA256 requires it" in refused(tmp_path, environ)


def test_only_its_weights(tmp_path: Path, bundle: Path, store: Store) -> None:
    """They are not those of this manifest: here the index fits, and the load finds the headers."""
    older = make_bundle(tmp_path / "older", seed=2)
    (older / "model.tensors").replace(bundle / "model.tensors")
    environ = store.put(bundle)
    uri = environ.pop("TENSORSERVE_MODEL_URI")
    code, said = command("verify", environ, uri)
    assert code == 65
    assert "exchanged" in said or "does not have the sha256 that the manifest gives" in said
