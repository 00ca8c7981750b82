"""Attack: tensors of an encrypted file get each other's names. Every chunk stays authentic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forging import MANIFEST, cut_digests, downgrade, relabel, rewrite
from loads import load
from starting import command, refused, start
from tensorizer import EncryptionParams, TensorSerializer
from victims import KEY, LAYERS, Store

from tensorserve.errors import CorruptError


def theirs(directory: Path) -> Path:
    """The same bundle as tensorizer writes it: no manifest, a digest in each header."""
    bundle = directory / "theirs"
    bundle.mkdir()
    serializer = TensorSerializer(str(bundle / "model.tensors"), encryption=EncryptionParams(KEY))
    serializer.write_state_dict({name: torch.randn(64, 64) for name in LAYERS})
    serializer.close()
    (bundle / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (bundle / "tokenizer.json").write_text('{"version": "1.0"}')
    return bundle


def test_with_the_manifest_as_it_was(tmp_path: Path, bundle: Path, store: Store) -> None:
    """It knows the index."""
    relabel(bundle / "model.tensors", *LAYERS)
    assert "The index of model.tensors" in refused(tmp_path, store.put(bundle))


def test_with_the_manifest_made_to_fit(tmp_path: Path, bundle: Path, store: Store) -> None:
    """Its MAC cannot be."""
    relabel(bundle / "model.tensors", *LAYERS)
    rewrite(bundle)
    assert "somebody without the key changed the manifest" in refused(tmp_path, store.put(bundle))


@pytest.mark.parametrize("manifest", ["none", "version 1"])
def test_without_the_manifest(tmp_path: Path, bundle: Path, store: Store, manifest: str) -> None:
    """Nothing in our files says which tensor is which; so it is said, with what to do."""
    relabel(bundle / "model.tensors", *LAYERS)
    if manifest == "none":
        (bundle / MANIFEST).unlink()
    else:
        rewrite(bundle, downgrade)
    environ = store.put(bundle)
    said = refused(tmp_path, environ)
    assert "tensorserve sign" in said
    assert "TENSORSERVE_VERIFY=tags" in said
    uri = environ.pop("TENSORSERVE_MODEL_URI")
    assert command("verify", environ, uri)[0] == 65
    assert command("sign", environ, uri)[0] == 65


def test_in_a_file_that_tensorizer_wrote(tmp_path: Path, store: Store) -> None:
    """Each tensor's own digest covers its name; the load ends before the second one is there."""
    bundle = theirs(tmp_path)
    sound = load(store.put(bundle))
    assert list(sound) == list(LAYERS)
    relabel(bundle / "model.tensors", *LAYERS)
    environ = store.put(bundle)
    with pytest.raises(CorruptError, match="does not have the sha256") as caught:
        load(environ)
    assert caught.value.exit_code == 65
    tags = load(environ | {"TENSORSERVE_VERIFY": "tags"})
    assert torch.equal(tags[LAYERS[0]], sound[LAYERS[1]]), "that is what `tags` lets through"


def test_with_the_digests_cut_out(tmp_path: Path, store: Store) -> None:
    """A sealed file whose headers have none is in order, but not without a manifest."""
    bundle = theirs(tmp_path)
    cut_digests(bundle / "model.tensors")
    relabel(bundle / "model.tensors", *LAYERS)
    environ = store.put(bundle)
    assert "neither an authenticated manifest" in refused(tmp_path, environ)
    ended = start(tmp_path, environ | {"TENSORSERVE_VERIFY": "tags"})
    assert ended.code is None, ended.text
    assert ended.mode == "tags"
    assert ended.text.count("tensorserve: warning: TENSORSERVE_VERIFY=tags") == 1
