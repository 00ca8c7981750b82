"""`tensorserve pack-adapter`: one adapter as a bundle of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_signers import make_pair, verify_key
from tensorserve.bundle.adapter_identity import AdapterIdentity
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import KEY as BY_KEY
from tensorserve.bundle.manifest import Manifest, parse_manifest
from tensorserve.cli import main as tensorserve
from tensorserve.secret import Secret

KEY = "33" * 32


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """As PEFT saves it."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file({"base_model.model.a.lora_A.weight": torch.ones(4, 8)},
              directory / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "README.md").write_text("about")
    return directory


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A key that exists."""
    path = tmp_path / "key"
    path.write_text(KEY)
    return path


def manifest_of(bundle: Path, key: str | None = KEY) -> Manifest:
    given = None if key is None else parse_key(Secret(key))
    return parse_manifest((bundle / "manifest.json").read_bytes(), "manifest.json", given)


def test_its_manifest_binds_name_and_model(
    tmp_path: Path, adapter: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Authenticated; the name is the folder's."""
    words = ["pack-adapter", str(adapter), str(tmp_path / "store" / "sql"), "--base-model", "m/v1"]
    assert tensorserve([*words, "--encrypt", "--key-file", str(key_file)]) == 0
    said = capsys.readouterr().out
    assert "adapter sql, rank 4, 1 tensors" in said
    assert "for m/v1" in said
    assert "left out: README.md" in said
    manifest = manifest_of(tmp_path / "store" / "sql")
    assert manifest.adapter == AdapterIdentity("sql", "m/v1")
    assert manifest.authenticated_by == BY_KEY
    files = {path.name for path in (tmp_path / "store" / "sql").iterdir()}
    assert files == {"manifest.json", "adapter_config.json", "adapter_model.tensors"}


def test_verify_and_sign_know_it(
    tmp_path: Path, adapter: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signed one is still that adapter."""
    bundle = tmp_path / "sql"
    words = ["pack-adapter", str(adapter), str(bundle), "--encrypt", "--key-file", str(key_file)]
    assert tensorserve(words) == 0
    monkeypatch.setenv("TENSORSERVE_KEY_FILE", str(key_file))
    assert tensorserve(["verify", str(bundle)]) == 0
    assert tensorserve(["sign", str(bundle)]) == 0
    assert manifest_of(bundle).adapter == AdapterIdentity("sql")


def test_the_key_may_be_that_of_the_models_bundle(
    tmp_path: Path, adapter: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the settings that serve it."""
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setenv("TENSORSERVE_KEY_FILE", str(key_file))
    words = ["pack-adapter", str(adapter), str(tmp_path / "sql"), "--encrypt"]
    assert tensorserve([*words, "--model", str(model)]) == 0
    assert manifest_of(tmp_path / "sql").authenticated_by == BY_KEY


def test_without_a_key_there_is_none_to_take(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a plain model, say."""
    model = tmp_path / "model"
    model.mkdir()
    words = ["pack-adapter", str(adapter), str(tmp_path / "sql"), "--encrypt"]
    assert tensorserve([*words, "--model", str(model)]) == 78
    assert "--model gives no key" in capsys.readouterr().err
    assert not (tmp_path / "sql").exists()


def test_a_plain_one_has_its_name_too(tmp_path: Path, adapter: Path) -> None:
    """Nobody vouches for it."""
    assert tensorserve(["pack-adapter", str(adapter), str(tmp_path / "sql")]) == 0
    manifest = manifest_of(tmp_path / "sql", None)
    assert manifest.adapter == AdapterIdentity("sql")
    assert manifest.authenticated_by is None


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--encrypt"], 64, "--encrypt needs a key"),
        (["--key-file", "k"], 64, "--key-file without --encrypt"),
        (["--model", "/m"], 64, "--model without --encrypt"),
        (["--encrypt", "--key-file", "k", "--model", "/m"], 64, "exclude each other"),
        (["--base-model", ""], 64, "is not the name of a model"),
        (["--base-model", "a\nb"], 64, "is not the name of a model"),
    ],
)
def test_options_that_contradict_each_other(
    tmp_path: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    said: str,
) -> None:
    """Nothing is written."""
    words = ["pack-adapter", str(adapter), str(tmp_path / "sql"), *options]
    assert tensorserve(words) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sql").exists()


@pytest.mark.parametrize("name", ["-sql", ".sql", "s ql", "a" * 129, "ä"])
def test_a_folder_that_is_no_name_is_refused(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """No request could ask for it."""
    assert tensorserve(["pack-adapter", str(adapter), f"{tmp_path}/{name}"]) == 64
    assert "cannot be the name of an adapter" in capsys.readouterr().err


def test_what_vllm_does_not_serve_is_refused(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    assert tensorserve(["pack-adapter", str(adapter), str(tmp_path / "sql")]) == 78
    assert "use_dora True" in capsys.readouterr().err
    assert not (tmp_path / "sql").exists()


def test_an_existing_one_is_replaced_only_if_asked(tmp_path: Path, adapter: Path) -> None:
    """As with `pack`."""
    words = ["pack-adapter", str(adapter), str(tmp_path / "sql")]
    assert [tensorserve(words), tensorserve(words), tensorserve([*words, "--overwrite"])] == [
        0,
        78,
        0,
    ]


@pytest.mark.parametrize(
    "member",
    [[], "sql", {"name": "../x", "base_model_name": None}, {"name": "sql"}, {"name": 1},
     {"name": "sql", "base_model_name": 1}, {"name": "sql", "base_model_name": "a\n"}],
)  # fmt: skip
def test_a_manifest_with_another_identity_is_no_manifest(
    tmp_path: Path, adapter: Path, member: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a plain one, which anybody can write."""
    assert tensorserve(["pack-adapter", str(adapter), str(tmp_path / "sql")]) == 0
    path = tmp_path / "sql" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter": member}))
    assert tensorserve(["verify", str(tmp_path / "sql")]) == 65
    assert "is not a manifest" in capsys.readouterr().err


def test_it_is_signed_as_a_bundle_is(
    tmp_path: Path, adapter: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenSSF's own command verifies it; one that is packed again without has no signature."""
    pair, there = make_pair(tmp_path), tmp_path / "store" / "sql"
    words = ["pack-adapter", str(adapter), str(there), "--encrypt", "--key-file", str(key_file)]
    assert tensorserve([*words, "--sign-key", str(pair.private)]) == 0
    assert f"model.sig: signed by {pair.signer.by}" in capsys.readouterr().out
    assert verify_key(there, pair.public)[0] == 0
    (there / "adapter_config.json").write_text("{}")
    assert verify_key(there, pair.public)[0] != 0
    assert tensorserve([*words, "--overwrite"]) == 0
    assert not (there / "model.sig").exists()
