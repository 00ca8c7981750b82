"""Sigstore's keyless signatures: verified offline, for one identity, and nothing else passes."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from hf_samples import ACCESS, make_model
from model_signers import Authority, make_pair, model_signing
from sigstore_stand_in import ISSUER, Sigstore, token
from tensorserve.bundle.manifest import SIGNATURE
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.config.signature import with_signature
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, SignatureError
from tensorserve.launch.codec import decode, encode
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret

Changed = Callable[[Any], object]


@pytest.fixture
def instance() -> Iterator[Sigstore]:
    with Sigstore() as found:
        yield found


def packed(tmp_path: Path, signer: BundleSigner | None) -> Path:
    make_model(tmp_path / "hf")
    key = Secret(bytes(32), "the test")
    pack(tmp_path / "hf", str(tmp_path / "b"), access=ACCESS, key=key, signer=signer)
    return tmp_path / "b"


def asking(instance: Sigstore, tmp_path: Path, **other: str) -> SourceSettings:
    """Settings; the key is one that cannot be had."""
    given = instance.settings(tmp_path) | {"TENSORSERVE_KEY_URI": f"file:{tmp_path / 'no key'}"}
    given |= {f"TENSORSERVE_SIGNATURE_{name.upper()}": value for name, value in other.items()}
    return SourceSettings.from_environment(given)


def test_it_is_verified_offline(
    tmp_path: Path, instance: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection is made. The signer is named, in every process of a start."""
    bundle = packed(tmp_path, instance.signer(tmp_path))

    def no_network(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    found = with_signature(asking(instance, tmp_path), str(bundle))
    assert str(found.signed_by).startswith(f"{instance.identity} by {ISSUER}, certificate ")
    assert decode(SourceSettings, json.loads(json.dumps(encode(found)))) == found


def test_model_signing_and_we_agree(tmp_path: Path, instance: Sigstore) -> None:
    """Each accepts what the other signed, and refuses another identity."""
    bundle = packed(tmp_path, instance.signer(tmp_path))
    config = ("--trust_config", tmp_path / "config.json", "--signature", bundle / SIGNATURE)
    asked = ("verify", "sigstore", bundle, *config, "--identity_provider", ISSUER, "--identity")
    code, printed = model_signing(*asked, instance.identity)
    assert code == 0, printed
    assert model_signing(*asked, "somebody@example.org")[0] != 0
    (bundle / SIGNATURE).unlink()
    identity = "https://ci.example/release@main"
    code, printed = model_signing(
        "sign", "sigstore", bundle, *config, "--identity_token", token(identity)
    )
    assert code == 0, printed
    given = asking(instance, tmp_path, identity=identity)
    assert identity in str(with_signature(given, str(bundle)).signed_by)
    with pytest.raises(SignatureError, match="do not match"):
        with_signature(asking(instance, tmp_path), str(bundle))


def entry(document: Any) -> Any:
    return document["verificationMaterial"]["tlogEntries"][0]


def proof(pair: Any) -> Any:
    return entry(pair[0])["inclusionProof"]


def of_another(part: str) -> Changed:
    """Take `part` from a second signature of the same signer over other files."""
    return lambda pair: pair[0].update({part: pair[1][part]})


CHANGES: dict[str, tuple[Changed, str]] = {
    "not in the log": (
        lambda pair: pair[0]["verificationMaterial"].update(tlogEntries=[]),
        "exactly one log entry",
    ),
    "the log's entry of another": (
        lambda pair: entry(pair[0]).update(entry(pair[1])),
        "payload hash does not match|inconsistent|log entry",
    ),
    "material of another": (of_another("verificationMaterial"), "DSSE: invalid signature"),
    "content of another": (of_another("dsseEnvelope"), "DSSE: invalid signature"),
    "content changed": (
        lambda pair: pair[0]["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
        "DSSE: invalid signature",
    ),
    "another time": (
        lambda pair: entry(pair[0]).update(integratedTime=str(int(time.time()) - 9)),
        "invalid log entry: SET",
    ),
    "another root of the log": (
        lambda pair: proof(pair).update(rootHash=base64.b64encode(bytes(32)).decode()),
        "invalid log entry: inclusion proof",
    ),
    "another checkpoint": (
        lambda pair: proof(pair)["checkpoint"].update(
            envelope=proof(pair)["checkpoint"]["envelope"].replace("a log", "A log")
        ),
        "invalid log entry: checkpoint",
    ),
    "no promise": (lambda pair: entry(pair[0]).pop("inclusionPromise"), "promise"),
    "no certificate": (
        lambda pair: pair[0]["verificationMaterial"].update(certificate={"rawBytes": "AAAA"}),
        "refuses it",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_signature_is_refused(tmp_path: Path, instance: Sigstore, change: str) -> None:
    """65 before the key is looked at, and it is said what does not fit."""
    signer = instance.signer(tmp_path)
    bundle = packed(tmp_path, signer)
    another = json.loads(signer.sign({"manifest.json": "0" * 64}, "another"))
    path = bundle / SIGNATURE
    pair = (json.loads(path.read_bytes()), another)
    changed, why = CHANGES[change]
    changed(pair)
    path.write_text(json.dumps(pair[0]))
    with pytest.raises(SignatureError, match=rf"model\.sig is not accepted: .*({why})"):
        with_key(asking(instance, tmp_path), str(bundle))


def test_another_signer_is_refused(tmp_path: Path, instance: Sigstore) -> None:
    """Another identity, the same one of another issuer, and all of another Sigstore."""
    bundle = packed(tmp_path, instance.signer(tmp_path))
    with pytest.raises(SignatureError, match="do not match boss@"):
        with_key(asking(instance, tmp_path, identity="boss@example.org"), str(bundle))
    with pytest.raises(SignatureError, match=f"got '{ISSUER}', expected 'https://evil"):
        with_key(asking(instance, tmp_path, issuer="https://evil.example"), str(bundle))
    with Sigstore() as other, pytest.raises(SignatureError, match="of no authority in the trust"):
        with_key(asking(other, tmp_path), str(bundle))


@pytest.mark.parametrize("part", ["tlogs", "ctlogs"])
def test_a_log_of_somebody_else_is_refused(tmp_path: Path, instance: Sigstore, part: str) -> None:
    """Though the authority is the right one."""
    bundle = packed(tmp_path, instance.signer(tmp_path))
    root = json.loads(instance.trust_root)
    with Sigstore() as other:
        root[part] = json.loads(other.trust_root)[part]
    given = instance.settings(tmp_path)
    (tmp_path / "root.json").write_text(json.dumps(root))
    settings = SourceSettings.from_environment(given)
    why = "invalid log entry" if part == "tlogs" else "SCT"
    with pytest.raises(SignatureError, match=why):
        with_signature(settings, str(bundle))


def test_one_that_had_expired_is_refused(tmp_path: Path, instance: Sigstore) -> None:
    """The log took it an hour after the certificate. Our own signer does not write such a one."""
    bundle = packed(tmp_path, instance.signer(tmp_path))
    good = (bundle / SIGNATURE).read_bytes()
    instance.logged_after = datetime.timedelta(hours=1)
    from sigstore.dsse import Statement
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken
    from sigstore.sign import SigningContext

    context = SigningContext.from_trust_config(ClientTrustConfig.from_json(instance.trust_config))
    payload = base64.b64decode(json.loads(good)["dsseEnvelope"]["payload"])
    with context.signer(IdentityToken(token(instance.identity))) as signer:
        (bundle / SIGNATURE).write_text(signer.sign_dsse(Statement(payload)).to_json())
    with pytest.raises(SignatureError, match="was not valid when it was signed"):
        instance.signer(tmp_path).sign({"manifest.json": "0" * 64}, "b")
    with pytest.raises(SignatureError, match=r"valid when it was signed .*validation time"):
        with_key(asking(instance, tmp_path), str(bundle))


def test_kinds_of_signatures_are_not_mixed(tmp_path: Path, instance: Sigstore) -> None:
    """A key's where Sigstore's is asked for, and Sigstore's where a key's or a certificate's is."""
    pair, root = make_pair(tmp_path), Authority("the root")
    bundle = packed(tmp_path, pair.signer)
    with pytest.raises(SignatureError, match="it was signed with a key, and TENSORSERVE_SIGN"):
        with_key(asking(instance, tmp_path), str(bundle))
    made = instance.signer(tmp_path).sign({"manifest.json": "0" * 64}, "b")
    (bundle / SIGNATURE).write_bytes(made)
    for name, value in (("KEY", pair.public.read_text()), ("CERTIFICATES", root.pem.decode())):
        given = SourceSettings.from_environment({f"TENSORSERVE_SIGNATURE_{name}": value})
        with pytest.raises(SignatureError, match="Sigstore's keyless signing, and TENSORSERVE"):
            with_signature(given, str(bundle))


def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, instance: Sigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """78 for each, before anything is read."""
    good = instance.settings(tmp_path)
    identity, issuer, root = good
    (tmp_path / "empty.json").write_text("{}")
    for given, why in (
        ({identity: "a"}, f"need {issuer} and {root} as well"),
        ({root: good[root]}, f"need {identity} and {issuer} as well"),
        (good | {root: str(tmp_path / "empty.json")}, "is not Sigstore's trust root"),
        (good | {root: str(tmp_path / "none.json")}, "cannot be read"),
        (
            good | {"TENSORSERVE_SIGNATURE_KEY": make_pair(tmp_path).public.read_text()},
            f"Both TENSORSERVE_SIGNATURE_KEY and {identity} are set",
        ),
    ):
        with pytest.raises(ConfigurationError, match=why):
            SourceSettings.from_environment(given)
    monkeypatch.setitem(sys.modules, "sigstore.models", None)
    with pytest.raises(ConfigurationError, match=r"needs the library `sigstore`") as caught:
        SourceSettings.from_environment(good)
    assert "pip install 'tensorserve[sigstore]'" in str(caught.value)


def test_the_public_root_is_one(tmp_path: Path, instance: Sigstore) -> None:
    """As the library carries it; a private instance's signature is none of the public one."""
    bundle = packed(tmp_path, instance.signer(tmp_path))
    stored = importlib.resources.files("sigstore") / "_store"
    name = quote("https://tuf-repo-cdn.sigstore.dev", safe="")
    root = (stored / name / "trusted_root.json").read_text()
    given = asking(instance, tmp_path)
    given = replace(given, signature_trust_root=Secret(root, "the library"))
    with pytest.raises(SignatureError, match="of no authority in the trust root"):
        with_signature(given, str(bundle))


def test_the_plan_says_whose_sigstore(tmp_path: Path, instance: Sigstore) -> None:
    """Without looking at the bundle."""
    environ = {"TENSORSERVE_MODEL_URI": "s3://b/m"} | instance.settings(tmp_path)
    given = Settings.from_environment(environ)
    shown = describe(make_plan(given, ()), given)
    assert shown["signature"] == f"required, of {instance.identity} by {ISSUER} (Sigstore)"


def test_a_start_without_it_does_not_import_it(tmp_path: Path) -> None:
    """Neither without a signature nor with a key's."""
    bundle = packed(tmp_path, make_pair(tmp_path).signer)
    program = (
        "import sys\n"
        "from tensorserve.config.settings import Settings\n"
        "from tensorserve.config.signature import with_signature\n"
        "given = Settings.from_environment({'TENSORSERVE_MODEL_URI': sys.argv[1],"
        " 'TENSORSERVE_SIGNATURE_KEY_FILE': sys.argv[2]})\n"
        "assert with_signature(given, sys.argv[1]).signed_by is not None\n"
        "sys.exit(any(name.startswith('sigstore') for name in sys.modules))\n"
    )
    words = [sys.executable, "-c", program, str(bundle), str(tmp_path / "sign.pub")]
    assert subprocess.run(words, check=False, timeout=120).returncode == 0
