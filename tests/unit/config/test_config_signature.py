"""A signature that is asked for is checked before anything is asked of a key service."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hf_samples import ACCESS, make_model
from model_signers import Authority, Pair, make_pair
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE
from tensorserve.bundle.signature_trust import SignedBy
from tensorserve.config import signature as module
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.config.signature import with_signature
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, SignatureError
from tensorserve.launch.codec import decode, encode
from tensorserve.packing.model_signer import ModelSigner
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import ForbiddenError, NotFoundError


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPLACING_SECONDS", 0.0)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path)


def packed(tmp_path: Path, signer: ModelSigner | None, key: bytes | None = bytes(32)) -> Path:
    source = tmp_path / "hf"
    if not source.exists():
        make_model(source)
    secret = None if key is None else Secret(key, "the test")
    where = tmp_path / "b"
    pack(source, str(where), access=ACCESS, key=secret, signer=signer, overwrite=True)
    return where


def settings(**variables: object) -> SourceSettings:
    given = {f"TENSORSERVE_{name.upper()}": str(value) for name, value in variables.items()}
    return SourceSettings.from_environment(given)


def test_the_signed_manifest_is_the_only_one(tmp_path: Path, pair: Pair) -> None:
    """Of an encrypted and of a plain bundle; all processes of the start are told."""
    for key in (bytes(32), None):
        bundle = packed(tmp_path, pair.signer, key)
        found = with_signature(settings(signature_key_file=pair.public), str(bundle))
        assert found.signed_by == pair.signer.by
        sha256 = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
        assert found.manifest_sha256 == sha256
        assert decode(SourceSettings, json.loads(json.dumps(encode(found)))) == found
        # Without the setting a signature is not looked at.
        assert with_signature(settings(), str(bundle)).signed_by is None


def test_certificates_say_who(tmp_path: Path, pair: Pair) -> None:
    """The subject, for the log and `check`."""
    root = Authority("the root")
    (tmp_path / "chain.pem").write_bytes(root.issue(pair, name="the release job"))
    (tmp_path / "root.pem").write_bytes(root.pem)
    bundle = packed(tmp_path, ModelSigner.read(pair.private, tmp_path / "chain.pem"))
    given = settings(signature_certificates_file=tmp_path / "root.pem")
    by = with_signature(given, str(bundle)).signed_by
    assert isinstance(by, SignedBy)
    assert str(by).startswith("CN=the release job, certificate ")


def test_what_is_refused_and_what_is_said(tmp_path: Path, pair: Pair) -> None:
    """Each with what to do; a wrong address is not called unsigned."""
    bundle = packed(tmp_path, None)
    given = settings(signature_key_file=pair.public)
    with pytest.raises(SignatureError, match=r"b is not signed: .* TENSORSERVE_SIGNATURE_KEY_FILE"):
        with_signature(given, str(bundle))
    with pytest.raises(NotFoundError, match=r"There is no manifest\.json either"):
        with_signature(given, str(tmp_path / "nothing"))
    bundle = packed(tmp_path, make_pair(tmp_path, "other").signer)
    with pytest.raises(SignatureError, match="its signature is not of the key"):
        with_signature(given, str(bundle))
    bundle = packed(tmp_path, pair.signer)
    pinned = settings(signature_key_file=pair.public, manifest_sha256="0" * 64)
    with pytest.raises(SignatureError, match=r"TENSORSERVE_MANIFEST_SHA256 is 00.* another bundle"):
        with_signature(pinned, str(bundle))
    (bundle / SIGNATURE).write_bytes(b"x" * (8 * 1024**2 + 1))
    with pytest.raises(SignatureError, match="too large"):
        with_signature(given, str(bundle))


@pytest.mark.parametrize("change", ["changed", "cut", "gone", "weights cut", "weights gone"])
def test_changed_files_are_named(tmp_path: Path, pair: Pair, change: str) -> None:
    """Small ones whatever has changed, weights where their size has; the key is not looked at."""
    bundle = packed(tmp_path, pair.signer)
    name = "model.tensors" if change.startswith("weights") else "tokenizer.json"
    path = bundle / name
    data = path.read_bytes()
    if change == "changed":
        path.write_bytes(data[:-1] + b"?")
    elif change.endswith("cut"):
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    given = settings(signature_key_file=pair.public, key_uri=f"file:{tmp_path / 'no such key'}")
    with pytest.raises(SignatureError, match=rf"not the bundle that was signed by key .*{name} \("):
        with_key(given, str(bundle))


def test_a_bundle_that_is_signed_again_just_then(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rewrap` replaces two files: who reads between them looks once more."""
    bundle = packed(tmp_path, pair.signer)
    old = (bundle / SIGNATURE).read_bytes()
    packed(tmp_path, pair.signer)
    new = (bundle / SIGNATURE).read_bytes()
    (bundle / SIGNATURE).write_bytes(old)
    given = settings(signature_key_file=pair.public)
    with pytest.raises(SignatureError, match="is not the file that was signed"):
        with_signature(given, str(bundle))
    monkeypatch.setattr(module.time, "sleep", lambda _: (bundle / SIGNATURE).write_bytes(new))
    assert with_signature(given, str(bundle)).signed_by == pair.signer.by


def test_a_signature_that_may_not_be_read(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """77: some stores answer so for what is not there."""
    from tensorserve.bundle import model_signature

    def forbidden(*_: Any) -> Any:
        raise ForbiddenError("403 for model.sig.")

    bundle = packed(tmp_path, pair.signer)
    monkeypatch.setattr(model_signature.sources, "open_source", forbidden)
    with pytest.raises(ForbiddenError, match="asks for a signature") as caught:
        with_signature(settings(signature_key_file=pair.public), str(bundle))
    assert caught.value.exit_code == 77
    assert "the bundle is not signed" in str(caught.value)


def test_mistakes_are_found_before_anything_is_read(tmp_path: Path, pair: Pair) -> None:
    """A private key, a text, both settings, nothing."""
    root = Authority("the root")
    (tmp_path / "root.pem").write_bytes(root.pem)
    for given, said in (
        ({"signature_key_file": pair.private}, "EC public keys"),
        ({"signature_key": "text"}, "EC public keys"),
        ({"signature_certificates_file": pair.public}, "certificates in PEM"),
        (
            {
                "signature_certificates_file": tmp_path / "root.pem",
                "signature_key_file": pair.public,
            },
            "Both TENSORSERVE_SIGNATURE_KEY and",
        ),
    ):
        with pytest.raises(ConfigurationError, match=said):
            settings(**given)
    assert "needs no signature" in settings(signature_key="").warnings[0]


def test_the_plan_says_whose_signature(pair: Pair) -> None:
    """Without looking at the bundle."""
    root = Authority("the root")
    for name, value, said in (
        ("SIGNATURE_KEY", pair.public.read_text(), f"of key {pair.signer.by.fingerprint}"),
        ("SIGNATURE_CERTIFICATES", root.pem.decode(), "of a certificate below CN=the root"),
    ):
        environ = {"TENSORSERVE_MODEL_URI": "s3://b/m", f"TENSORSERVE_{name}": value}
        given = Settings.from_environment(environ)
        shown = describe(make_plan(given, ()), given)
        assert shown["signature"] == f"required, {said}"
    given = Settings.from_environment({"TENSORSERVE_MODEL_URI": "s3://b/m"})
    assert "signature" not in describe(make_plan(given, ()), given)
