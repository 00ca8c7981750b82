"""Attack: the draft model in a bundle is exchanged: for the model itself, for another bundle's, or
for one that was planted.

All files are sealed with the same key, and those of model and draft have the same index.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forging import downgrade, exchange, rewrite
from loads import load
from starting import command, refused
from victims import Store, make_bundle, make_source

from tensorserve.errors import CorruptError
from tensorserve.packing.draft_checkpoint import read_draft

FLAGS = {"TENSORSERVE_VLLM_SPECULATIVE_CONFIG": json.dumps({"num_speculative_tokens": 2})}
MODEL, DRAFT = Path("model.tensors"), Path("draft/small/model.tensors")


@pytest.fixture
def drafted(tmp_path: Path) -> Path:
    """A bundle with a draft of the same size as its model."""
    source = make_source(tmp_path / "small", seed=2)
    return make_bundle(tmp_path / "drafted", draft=read_draft(source))


def test_for_the_model_itself(drafted: Path, store: Store) -> None:
    """Size and index fit; the headers do not, which each of the two loads finds."""
    exchange(drafted / MODEL, drafted / DRAFT)
    environ = store.put(drafted) | FLAGS
    for draft in (False, True):
        with pytest.raises(CorruptError, match="not those of the manifest"):
            load(environ, draft=draft)
    code, said = command("verify", environ, environ.pop("TENSORSERVE_MODEL_URI"))
    assert code == 65
    assert "2 of" in said


def test_a_draft_that_is_as_it_was_packed_loads(drafted: Path, store: Store) -> None:
    """So the others are refused for what was done to them."""
    environ = store.put(drafted) | FLAGS
    assert load(environ).keys() == load(environ, draft=True).keys()


def test_for_another_bundles_draft(tmp_path: Path, drafted: Path, store: Store) -> None:
    """Of the same owner and name, with other tensors."""
    source = make_source(tmp_path / "3" / "small", seed=3)
    other = make_bundle(tmp_path / "other", draft=read_draft(source))
    shutil.copy(other / DRAFT, drafted / DRAFT)
    with pytest.raises(CorruptError, match="not those of the manifest"):
        load(store.put(drafted) | FLAGS, draft=True)


def test_planted_beside_a_manifest_that_names_none(
    tmp_path: Path, bundle: Path, drafted: Path, store: Store
) -> None:
    """A bundle has the draft that its manifest names, and no other."""
    shutil.copytree(drafted / "draft", bundle / "draft")
    said = refused(tmp_path, store.put(bundle) | FLAGS, code=78)
    assert "none was packed with it" in said


@pytest.mark.parametrize("version", [2, 1])
def test_with_the_manifest_made_to_fit(
    tmp_path: Path, drafted: Path, store: Store, version: int
) -> None:
    """Its MAC cannot be; one of version 1 authenticates nothing."""
    exchange(drafted / MODEL, drafted / DRAFT)
    if version == 1:
        rewrite(drafted, downgrade)
        words = "neither an authenticated manifest"
    else:
        rewrite(drafted)
        words = "somebody without the key"
    assert words in refused(tmp_path, store.put(drafted) | FLAGS)


def test_the_configuration_of_a_draft_is_bound_too(
    tmp_path: Path, drafted: Path, store: Store
) -> None:
    """It says which code vLLM runs."""
    config = drafted / DRAFT.with_name("config.json")
    config.write_text(config.read_text().replace("Llama", "Other"))
    assert "is not the file that was packed" in refused(tmp_path, store.put(drafted) | FLAGS)
