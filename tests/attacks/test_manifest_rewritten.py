"""Attack: manifest.json is changed, by somebody without the key or with another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import rewrite
from starting import refused
from victims import GIVEN, Store

from manifests import rewrite as rewrite_with
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import read_manifest
from tensorserve.sources import Access

Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, Change] = {
    "a file less": lambda d: d["files"].pop(),
    "a file more": lambda d: d["files"].append({"name": "x", "size": 0, "sha256": "0" * 64}),
    "another size": lambda d: d["tensors_files"]["model.tensors"].update(size=1),
    "another digest": lambda d: d["files"][0].update(sha256="0" * 64),
    "another maker": lambda d: d["made_by"].update(tensorserve="9"),
    "a member more": lambda d: d.update(note="nobody reads it"),
    "another MAC": lambda d: d["authentication"].update(mac="0" * 64),
    "another salt": lambda d: d["authentication"].update(salt="0" * 64),
    "other digests": lambda d: d["tensors_files"]["model.tensors"].update(digests=""),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change(tmp_path: Path, bundle: Path, disk: Store, change: Change) -> None:
    """Whatever it is, it is noticed before it is believed."""
    rewrite(bundle, change)
    said = refused(tmp_path, disk.put(bundle))
    assert "The key opens model.tensors, but the MAC of manifest.json is not this key's" in said


def test_in_the_bucket(tmp_path: Path, bundle: Path, store: Store) -> None:
    """The same from S3."""
    rewrite(bundle, lambda document: document["files"].pop())
    assert "somebody without the key" in refused(tmp_path, store.put(bundle))


def test_a_mac_of_another_key(tmp_path: Path, bundle: Path, store: Store) -> None:
    """His own model's, say."""
    rewrite_with(bundle, {"made_by": {}}, GivenKey(bytes(32), "another"))
    assert "somebody without the key" in refused(tmp_path, store.put(bundle))


def test_the_wrong_key_is_told_from_a_changed_manifest(
    tmp_path: Path, bundle: Path, store: Store
) -> None:
    """The weights are asked as well: the message must send nobody the wrong way."""
    environ = store.put(bundle) | {"TENSORSERVE_KEY": bytes(32).hex()}
    said = refused(tmp_path, environ)
    assert "The key from TENSORSERVE_KEY does not open model.tensors" in said.replace(
        environ["TENSORSERVE_MODEL_URI"] + "/", ""
    )
    assert "manifest" not in said


def test_written_anew_in_another_form_it_is_the_same(bundle: Path) -> None:
    """Indented or not, in any order: the MAC is over what it says."""
    before = read_manifest(str(bundle), Access(), GIVEN)
    path = bundle / "manifest.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    after = read_manifest(str(bundle), Access(), GIVEN)
    assert before is not None
    assert after is not None
    assert after.files == before.files
    assert after.sha256 != before.sha256
