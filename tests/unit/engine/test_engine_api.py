"""llm_kwargs: settings as arguments and from the environment, and all that it refuses by itself."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model_signers import make_pair
from tensorserve import llm_kwargs
from tensorserve.bundle.keys import GivenKey
from tensorserve.engine.api import handed_over_start, own_start, settings_environment
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    SignatureError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.packing.draft_checkpoint import read_draft
from tensorserve.packing.pack import pack
from tensorserve.packing.sign import sign
from tensorserve.secret import Secret
from tensorserve.sources import Access

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one, encrypted with KEY."""
    directory = tmp_path_factory.mktemp("llm")
    (directory / "hf").mkdir()
    save_file({"model.norm.weight": torch.ones(16)}, directory / "hf" / "model.safetensors")
    (directory / "hf" / "config.json").write_text("{}")
    (directory / "hf" / "tokenizer.json").write_text("{}")
    pack(directory / "hf", str(directory / "b"), access=Access(), key=Secret(KEY))
    return directory / "b"


def started(kwargs: dict[str, Any]) -> Any:
    """The start that the loader finds in what `LLM` is given."""
    return handed_over_start(kwargs["model_loader_extra_config"], {})


def test_arguments_win_over_the_environment(bundle: Path) -> None:
    """What is not given comes from there."""
    environ = {
        "TENSORSERVE_KEY": KEY.hex(),
        "TENSORSERVE_FETCH_CONNECTIONS": "3",
        "TENSORSERVE_VERIFY": "auto",
    }
    kwargs = llm_kwargs(str(bundle), verify="hashes", environ=environ)
    settings = started(kwargs).settings
    assert (settings.fetch_connections, settings.verify) == (3, "hashes")
    assert settings.key.reveal() == KEY
    assert kwargs["load_format"] == "tensorizer"
    names = {path.name for path in Path(kwargs["model"]).iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_loader_is_a_setting_as_any_other(bundle: Path) -> None:
    """`llm_kwargs(…, loader="reference")`; a loader that there is not is named before vLLM is."""
    kwargs = llm_kwargs(str(bundle), key=KEY, loader="reference", environ={})
    assert started(kwargs).settings.loader == "reference"
    assert started(llm_kwargs(str(bundle), key=KEY, environ={})).settings.loader == "auto"
    with pytest.raises(ConfigurationError, match="not one of auto, reference"):
        llm_kwargs(str(bundle), key=KEY, loader="tensorizer", environ={})


def test_a_signature_may_be_asked_for(bundle: Path, tmp_path: Path) -> None:
    """By `LLM`, and by a vLLM that was started alone; the signed manifest is pinned."""
    pair = make_pair(tmp_path)
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.hex()}
    asking = environ | {"TENSORSERVE_SIGNATURE_KEY_FILE": str(pair.public)}
    with pytest.raises(SignatureError, match="is not signed"):
        llm_kwargs(environ=asking)
    with pytest.raises(SignatureError, match="is not signed"):
        own_start(asking, 1)
    signed = tmp_path / "b"
    shutil.copytree(bundle, signed)
    key = GivenKey(KEY, "the test")
    sha256 = sign(str(signed), Access(), key, wish="auto", signer=pair.signer).sha256
    asking["TENSORSERVE_MODEL_URI"] = str(signed)
    for made in (started(llm_kwargs(environ=asking)), own_start(asking, 1)):
        assert made.settings.signed_by == pair.signer.by
        assert made.settings.manifest_sha256 == sha256


def test_what_vouches_for_the_weights_goes_with_the_start(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in `tensorserve serve`; what is weaker than it should be is a warning of the log."""
    # Imported, vLLM's server leaves the root logger above it.
    caplog.set_level(logging.WARNING)
    environ = {"TENSORSERVE_KEY": KEY.hex()}
    (shard,) = started(llm_kwargs(str(bundle), environ=environ)).shards
    assert (shard.verification, shard.check_digests, shard.digests) == ("manifest", False, None)
    (shard,) = started(llm_kwargs(str(bundle), verify="hashes", environ=environ)).shards
    assert (shard.verification, shard.check_digests) == ("manifest", True)
    assert len(bytes.fromhex(shard.digests)) == 32
    assert not caplog.records
    shutil.copytree(bundle, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(CorruptError, match="TENSORSERVE_VERIFY=tags"):
        llm_kwargs(str(tmp_path / "b"), environ=environ)
    (shard,) = started(llm_kwargs(str(tmp_path / "b"), verify="tags", environ=environ)).shards
    assert (shard.verification, shard.check_digests) == ("tags", False)
    assert "TENSORSERVE_VERIFY=tags" in caplog.text
    with pytest.raises(CorruptError, match="TENSORSERVE_MANIFEST_SHA256"):
        llm_kwargs(str(bundle), manifest_sha256="0" * 64, environ=environ)


def test_the_model_may_come_from_the_environment_too(bundle: Path) -> None:
    """All of it."""
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.hex()}
    assert started(llm_kwargs(environ=environ)).shards[0].uri == f"{bundle}/model.tensors"


def test_a_key_may_be_given_as_bytes_or_as_a_file(bundle: Path, tmp_path: Path) -> None:
    """It stands in nothing that vLLM gets or prints."""
    (tmp_path / "key").write_bytes(KEY)
    for given in ({"key": KEY}, {"key": KEY.hex()}, {"key_file": tmp_path / "key"}):
        kwargs = llm_kwargs(str(bundle), environ={}, **given)
        assert KEY.hex() not in str(kwargs)
        assert KEY not in b"".join(p.read_bytes() for p in Path(kwargs["model"]).iterdir())


@pytest.mark.parametrize(
    ("given", "environ", "kind", "said"),
    [
        ({"key": bytes(32)}, {}, WrongKeyError, "does not open"),
        ({}, {}, ConfigurationError, "encrypted"),
        ({"key": KEY, "fetch_connection": 2}, {}, ConfigurationError, "Did you mean"),
        ({"key": KEY, "passphrase": "x"}, {}, ConfigurationError, "Both a key and a passphrase"),
        ({"key": KEY}, {"TENSORSERVE_VLLM_DTYPE": "half"}, ConfigurationError, "tensorserve serve"),
    ],
)
def test_mistakes_are_said_before_vllm_is_there(
    bundle: Path,
    given: dict[str, Any],
    environ: dict[str, str],
    kind: type[TensorserveError],
    said: str,
) -> None:
    """Not after half a minute of imports."""
    with pytest.raises(kind) as caught:
        llm_kwargs(str(bundle), environ=environ, **given)
    assert said in str(caught.value)


def test_credentials_among_vllms_options_are_whole() -> None:
    """Nothing of the environment's is mixed with them: not its token, not its files."""
    environ = {
        "AWS_ACCESS_KEY_ID_FILE": "/secrets/id",
        "S3_SECRET_ACCESS_KEY": "another",
        "AWS_SESSION_TOKEN": "foreign",
        "AWS_REGION": "eu-1",
    }
    options = {
        "tensorizer_uri": "s3://b/m.tensors",
        "s3_access_key_id": "id",
        "s3_secret_access_key": "secret",
    }
    assert settings_environment(options, environ) == {
        "TENSORSERVE_MODEL_URI": "s3://b/m.tensors",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-1",
    }


def test_a_directory_without_a_model_is_said(tmp_path: Path) -> None:
    """Where it was looked for, and what is there instead."""
    with pytest.raises(CorruptError, match=f"{tmp_path} is empty"):
        llm_kwargs(str(tmp_path), environ={})
    (tmp_path / "other.tensors").touch()
    with pytest.raises(CorruptError, match=r"model\.tensors"):
        llm_kwargs(str(tmp_path), environ={})


def test_nothing_of_vllm_is_imported(bundle: Path) -> None:
    """The caller's own settings of vLLM's environment still count afterwards."""
    script = f"""
import sys
from tensorserve import llm_kwargs
llm_kwargs({str(bundle)!r}, key={KEY!r}, environ={{}})
assert "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_code_in_the_bundle_itself_must_be_vouched_for(bundle: Path, tmp_path: Path) -> None:
    """vLLM has run it by then; it answers no request with the model, whose key is the owner's."""
    place = tmp_path / "b"
    shutil.copytree(bundle, place)
    (place / "manifest.json").unlink()
    (place / "modeling_x.py").write_text("")
    environ = {
        "TENSORSERVE_MODEL_URI": str(place),
        "TENSORSERVE_KEY": KEY.hex(),
        "TENSORSERVE_VERIFY": "tags",
    }
    assert own_start(environ, 1, str(place), remote_code=False).shards
    with pytest.raises(CorruptError, match=r"would run modeling_x\.py"):
        own_start(environ, 1, str(place), remote_code=True)


@pytest.mark.parametrize(
    ("name", "content", "remote_code", "said"),
    [
        ("config.json", b"[]", False, "its SHA-256"),
        ("tokenizer.json", None, False, "missing"),
        ("chat_template.jinja", b"{{ planted }}", False, "not in manifest.json"),
        ("generation_config.json", b"{}", False, "not in manifest.json"),
        ("modeling_x.py", b"", True, "not in manifest.json"),
        ("modeling_x.py", b"", False, None),
        ("README.md", b"", True, None),
        ("model.safetensors.index.json", b"{}", True, None),
        (".git/config.json", b"{}", True, None),
    ],
)
def test_what_vllm_has_read_in_the_bundle_itself_is_compared(
    bundle: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    remote_code: bool,
    said: str | None,
) -> None:
    """`vllm serve DIR --load-format tensorizer`: the key authenticates what stands in DIR, too."""
    place = tmp_path / "b"
    shutil.copytree(bundle, place)
    changed = place / name
    changed.unlink(missing_ok=True)
    if content is not None:
        changed.parent.mkdir(exist_ok=True)
        changed.write_bytes(content)
    weights = f"{place}/model.tensors"
    environ = {"TENSORSERVE_MODEL_URI": weights, "TENSORSERVE_KEY": KEY.hex()}
    # Another directory is the user's own.
    assert own_start(environ, 1, str(tmp_path), remote_code=remote_code).shards
    if said is None:
        assert own_start(environ, 1, f"{place}/", remote_code=remote_code).shards
        return
    with pytest.raises(CorruptError, match=said) as caught:
        own_start(environ, 1, f"{place}/", remote_code=remote_code)
    assert name in str(caught.value)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """A bundle with a draft model, encrypted with KEY."""
    directory = tmp_path_factory.mktemp("drafted") / "b"
    draft = read_draft(bundle.parent / "hf")
    pack(bundle.parent / "hf", str(directory), access=Access(), key=Secret(KEY), draft=draft)
    return directory


def test_llm_drafts_with_the_bundles_own_draft_if_asked(drafted: Path) -> None:
    """vLLM is told where its configuration is, the loader where its weights are."""
    asked = {"num_speculative_tokens": 2}
    kwargs = llm_kwargs(str(drafted), key=KEY, speculative_config=asked, environ={})
    directory = Path(kwargs["model"], "draft", "hf")
    assert kwargs["speculative_config"] == asked | {"model": str(directory)}
    assert (directory / "config.json").is_file()
    draft = started(kwargs).draft
    assert draft.directory == str(directory)
    assert draft.shard.uri == str(drafted / "draft/hf/model.tensors")
    kwargs = llm_kwargs(str(drafted), key=KEY, environ={})
    assert "speculative_config" not in kwargs
    assert started(kwargs).draft is None


def test_llm_says_that_a_bundle_has_no_draft(bundle: Path) -> None:
    """Before vLLM is there; so is a draft's own directory that does not exist."""
    with pytest.raises(ConfigurationError, match="none was packed"):
        llm_kwargs(str(bundle), key=KEY, speculative_config={"method": "eagle"}, environ={})
    with pytest.raises(ConfigurationError, match="does not exist"):
        llm_kwargs(str(bundle), key=KEY, speculative_config={"model": "/none"}, environ={})


def test_vllm_alone_may_name_the_draft_in_a_bundle_on_a_disk(drafted: Path) -> None:
    """`vllm serve BUNDLE --load-format tensorizer`; another directory is another draft."""
    environ = {"TENSORSERVE_MODEL_URI": str(drafted), "TENSORSERVE_KEY": KEY.hex()}
    named = f"{drafted}/draft/hf"
    draft = own_start(environ, 1, str(drafted), draft=named).draft
    assert draft is not None
    assert (draft.directory, draft.shard.uri) == (named, f"{named}/model.tensors")
    assert own_start(environ, 1, str(drafted), draft="/models/draft").draft is None


def test_what_vllm_has_read_of_a_draft_in_the_bundle_is_compared(
    drafted: Path, tmp_path: Path
) -> None:
    """Also where the model's own configuration is read elsewhere."""
    bundle = shutil.copytree(drafted, tmp_path / "b")
    config = bundle / "draft" / "hf" / "config.json"
    config.write_text('{"auto_map": 1}')
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.hex()}
    assert own_start(environ, 1, str(tmp_path)).draft is None
    with pytest.raises(CorruptError, match=r"draft/hf/config\.json"):
        own_start(environ, 1, str(tmp_path), draft=str(config.parent))
