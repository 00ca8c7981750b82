"""--sign-identity-token: Sigstore's own client signs with a private one, or nothing is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_samples import make_model
from model_signers import make_pair, model_signing
from sigstore_stand_in import ISSUER, Sigstore, token
from tensorserve.bundle.manifest import SIGNATURE
from tensorserve.cli import main as tensorserve


@pytest.fixture
def instance() -> Iterator[Sigstore]:
    with Sigstore() as found:
        yield found


@pytest.fixture
def signing(tmp_path: Path, instance: Sigstore) -> list[str]:
    instance.signer(tmp_path)
    config = str(tmp_path / "config.json")
    return ["--sign-identity-token", str(tmp_path / "token"), "--sign-trust-config", config]


@pytest.fixture
def source(tmp_path: Path) -> str:
    make_model(tmp_path / "hf")
    return str(tmp_path / "hf")


def accepted(bundle: Path, config: Path, identity: str = Sigstore.identity) -> bool:
    """What OpenSSF's own command says."""
    words = ("--signature", bundle / SIGNATURE, "--identity", identity)
    config_words = ("--identity_provider", ISSUER, "--trust_config", config)
    return model_signing("verify", "sigstore", bundle, *words, *config_words)[0] == 0


def test_pack_sign_and_rewrap(
    tmp_path: Path,
    source: str,
    instance: Sigstore,
    signing: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`model_signing` accepts what each made; `verify` names the signer."""
    bundle, key = tmp_path / "b", str(tmp_path / "key")
    config = tmp_path / "config.json"
    words = ["pack", source, str(bundle), "--encrypt", "--key-file", key]
    assert tensorserve([*words, *signing]) == 0
    said = f"signed by {instance.identity} by {ISSUER}, certificate "
    assert said in capsys.readouterr().out
    assert accepted(bundle, config)
    monkeypatch.setenv("TENSORSERVE_KEY_FILE", key)
    (bundle / SIGNATURE).unlink()
    assert tensorserve(["sign", str(bundle), *signing]) == 0
    assert accepted(bundle, config)
    (tmp_path / "wrapping").write_bytes(bytes(range(32)))
    rewrap = ["rewrap", str(bundle), "--add", f"file:{tmp_path / 'wrapping'}", *signing]
    before = (bundle / SIGNATURE).read_bytes()
    assert tensorserve(rewrap) == 78
    assert "not said whose signature is expected" in capsys.readouterr().err
    assert (bundle / SIGNATURE).read_bytes() == before
    for name, value in instance.settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert tensorserve(rewrap) == 0
    assert accepted(bundle, config)
    capsys.readouterr()
    assert tensorserve(["verify", str(bundle)]) == 0
    assert said in capsys.readouterr().out
    # One that refuses leaves manifest and signature as they are, which fit.
    instance.refuses = True
    assert tensorserve(rewrap) == 69
    assert accepted(bundle, config)


def test_an_adapter_and_an_ambient_token(
    tmp_path: Path, signing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitLab's, which is a variable."""
    identity = "https://gitlab.example/release@refs/heads/main"
    monkeypatch.setenv("GITLAB_CI", "true")
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", token(identity))
    signing[1] = "ambient"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = {"base_model.model.a.lora_A.weight": torch.ones(4, 8)}
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert tensorserve(["pack-adapter", str(adapter), str(tmp_path / "sql"), *signing]) == 0
    assert accepted(tmp_path / "sql", tmp_path / "config.json", identity)
    assert not accepted(tmp_path / "sql", tmp_path / "config.json")


def test_what_cannot_sign_writes_nothing(
    tmp_path: Path, source: str, signing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The token is in no message."""
    pack = ["pack", source, str(tmp_path / "b")]
    pair = make_pair(tmp_path)
    assert tensorserve([*pack, *signing, "--sign-key", str(pair.private)]) == 64
    assert tensorserve([*pack, *signing[2:]]) == 64
    assert tensorserve([*pack, *signing[:3], str(pair.public)]) == 78
    assert "is not a client trust configuration of Sigstore" in capsys.readouterr().err
    for text in (token("somebody@example.org", -1), "no.secret.token"):
        (tmp_path / "token").write_text(text)
        assert tensorserve([*pack, *signing]) == 78
        said = capsys.readouterr().err
        assert "no OIDC token that is valid now" in said
        assert text not in said
    (tmp_path / "token").unlink()
    assert tensorserve([*pack, *signing]) == 78
    assert tensorserve([*pack, "--sign-identity-token", "ambient", *signing[2:]]) == 78
    assert "nothing here gives a token" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_sigstore_that_is_away(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """69, and no bundle with a manifest is left."""
    with Sigstore() as instance:
        instance.signer(tmp_path)
    words = ["--sign-identity-token", str(tmp_path / "token")]
    words += ["--sign-trust-config", str(tmp_path / "config.json")]
    assert tensorserve(["pack", source, str(tmp_path / "b"), *words]) == 69
    assert "Sigstore did not sign (ConnectionError" in capsys.readouterr().err
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_the_library_is_said_to_be_missing(
    tmp_path: Path,
    source: str,
    signing: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what to install."""
    monkeypatch.setitem(sys.modules, "sigstore.models", None)
    assert tensorserve(["pack", source, str(tmp_path / "b"), *signing]) == 78
    assert "pip install 'tensorserve[sigstore]'" in capsys.readouterr().err
