"""Attack: Python code is put into the bundle of a model that is served with --trust-remote-code."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from forging import MANIFEST, known_plaintext, rewrite
from starting import refused, start
from victims import Store

CODE = "import os; os.system('id')"
TRUSTED = {"TENSORSERVE_VLLM_TRUST_REMOTE_CODE": "true"}


def name_code(bundle: Path) -> None:
    """config.json sends transformers to it."""
    path = bundle / "config.json"
    names = {"AutoConfig": "configuration_evil.Config", "AutoModel": "modeling_evil.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": names}))


def test_beside_the_files(tmp_path: Path, bundle: Path, store: Store) -> None:
    """It is not in the manifest, so it is not fetched, trusted or not."""
    (bundle / "modeling_evil.py").write_text(CODE)
    (bundle / "tokenization_llama.py").write_text(CODE)
    ended = start(tmp_path, store.put(bundle) | TRUSTED)
    assert ended.code is None, ended.text
    assert not list(ended.model_dir.rglob("*.py"))


@pytest.mark.parametrize("wish", ["auto", "tags"])
def test_where_no_manifest_vouches(tmp_path: Path, bundle: Path, store: Store, wish: str) -> None:
    """The weights' own digests, or tags, say nothing of code, which would hold their key."""
    known_plaintext(bundle / "model.tensors", "model.norm.weight", struct.pack("<16f", *[1.0] * 16))
    (bundle / MANIFEST).unlink()
    (bundle / "modeling_evil.py").write_text(CODE)
    name_code(bundle)
    environ = store.put(bundle) | {"TENSORSERVE_VERIFY": wish}
    said = refused(tmp_path, environ | TRUSTED)
    assert "--trust-remote-code would run modeling_evil.py" in said
    assert "tensorserve sign" in said
    # Not trusted, it is not fetched: configuration and weights are served as ever.
    ended = start(tmp_path, environ)
    assert ended.code is None, ended.text
    assert not list(ended.model_dir.rglob("*.py"))


def test_and_named_in_the_configuration(tmp_path: Path, bundle: Path, store: Store) -> None:
    """The configuration is not the packed one then."""
    (bundle / "modeling_evil.py").write_text(CODE)
    name_code(bundle)
    assert "config.json" in refused(tmp_path, store.put(bundle) | TRUSTED)


def test_and_in_the_manifest(tmp_path: Path, bundle: Path, store: Store) -> None:
    """Its MAC cannot be made to fit."""
    (bundle / "modeling_evil.py").write_text(CODE)
    name_code(bundle)
    entry = {
        "name": "modeling_evil.py",
        "size": len(CODE),
        "sha256": hashlib.sha256(CODE.encode()).hexdigest(),
    }
    rewrite(bundle, lambda document: document["files"].append(entry))
    assert "somebody without the key" in refused(tmp_path, store.put(bundle) | TRUSTED)
