"""Attack: Python code is put into the bundle of a model that is served with --trust-remote-code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from forging import rewrite
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
