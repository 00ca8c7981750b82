"""model.sig: what we write `model_signing` accepts, and what it writes we do."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from model_signers import Authority, Pair, make_pair, model_signing, verify_key
from tensorserve.bundle.model_signature import (
    IGNORED,
    ModelSignature,
    parse_signature,
    signed_files,
    statement_of,
)
from tensorserve.bundle.signature_trust import TrustedCertificates, TrustedKeys
from tensorserve.errors import ConfigurationError, SignatureError
from tensorserve.packing.model_signer import ModelSigner
from tensorserve.secret import Secret

Changed = Callable[[dict[str, Any]], object]


def make_directory(root: Path) -> dict[str, str]:
    """Files as a bundle has them; {name: SHA-256}. Names that sort differently as paths."""
    contents = {
        "manifest.json": b"{}",
        "a.b": b"1",
        "a/b": b"2",
        "a/ü.txt": b"3",
        "model.tensors": bytes(3_000_000),
    }
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def keys_of(pair: Pair) -> TrustedKeys:
    return TrustedKeys.parse(Secret(pair.public.read_bytes(), "the key"))


def roots(*authorities: Authority) -> TrustedCertificates:
    pem = b"".join(authority.pem for authority in authorities)
    return TrustedCertificates.parse(Secret(pem, "the roots"))


def read(path: Path, trust: TrustedKeys | TrustedCertificates) -> ModelSignature:
    return parse_signature(path.read_bytes(), "model.sig", trust)


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_model_signing_accepts_what_we_sign(tmp_path: Path, curve: type) -> None:
    """Of a whole directory, with compiled code that came later; not when a file is another."""
    bundle = tmp_path / "bundle"
    files, pair = make_directory(bundle), make_pair(tmp_path, curve=curve)
    (bundle / "model.sig").write_bytes(pair.signer.sign(files, str(bundle)))
    (bundle / "compiled").mkdir()
    (bundle / "compiled" / "x.sealed").write_bytes(b"later")
    code, said = verify_key(bundle, pair.public)
    assert code == 0, said
    assert dict(read(bundle / "model.sig", keys_of(pair)).files) == files
    code, said = verify_key(bundle, make_pair(tmp_path, "other", curve).public)
    assert code != 0, said
    (bundle / "a" / "b").write_bytes(b"4")
    code, said = verify_key(bundle, pair.public)
    assert code != 0, said


def test_we_accept_what_model_signing_signs(tmp_path: Path) -> None:
    """And the statement is ours, but for the paths that it leaves out."""
    bundle = tmp_path / "bundle"
    files, pair = make_directory(bundle), make_pair(tmp_path)
    (bundle / ".gitattributes").write_text("left out by default")
    signature = bundle / "model.sig"
    code, said = model_signing(
        "sign", "key", bundle, "--signature", signature, "--private_key", pair.private
    )
    assert code == 0, said
    found = read(signature, keys_of(pair))
    assert dict(found.files) == files
    assert (found.by.kind, found.by.fingerprint) == ("key", pair.signer.by.fingerprint)
    theirs, ours = statement(signature), json.loads(statement_of(files, "bundle"))
    for one in (theirs, ours):
        one["predicate"]["serialization"].pop("ignore_paths")
    assert theirs == ours
    with pytest.raises(SignatureError, match="is not of the key from the key, but of key"):
        read(signature, keys_of(make_pair(tmp_path, "other")))


def statement(signature: Path) -> Any:
    document = json.loads(signature.read_text())
    return json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))


CHANGES: dict[str, Changed] = {
    "another media type": lambda d: d.update(mediaType=d["mediaType"].replace("0.3", "0.2")),
    "another payload type": lambda d: d["dsseEnvelope"].update(payloadType="text/plain"),
    "no signature": lambda d: d["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda d: d["dsseEnvelope"].update(
        signatures=d["dsseEnvelope"]["signatures"] * 2
    ),
    "a signature of no length": lambda d: d["dsseEnvelope"]["signatures"][0].update(sig=""),
    "no base64": lambda d: d["dsseEnvelope"]["signatures"][0].update(sig="?"),
    "a payload with a space more": lambda d: d["dsseEnvelope"].update(
        payload=base64.b64encode(base64.b64decode(d["dsseEnvelope"]["payload"]) + b" ").decode()
    ),
    "no material": lambda d: d.pop("verificationMaterial"),
    "keyless": lambda d: d.update(verificationMaterial={"certificate": {"rawBytes": ""}}),
    "no certificates": lambda d: d.update(
        verificationMaterial={"x509CertificateChain": {"certificates": []}}
    ),
    "too many certificates": lambda d: d.update(
        verificationMaterial={"x509CertificateChain": {"certificates": [{"rawBytes": ""}] * 9}}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_envelope_is_refused(tmp_path: Path, change: str) -> None:
    """One line says so, whatever it is."""
    files, pair = make_directory(tmp_path / "b"), make_pair(tmp_path)
    document = json.loads(pair.signer.sign(files, "b"))
    CHANGES[change](document)
    with pytest.raises(SignatureError, match=r"model\.sig is not accepted: "):
        parse_signature(json.dumps(document).encode(), "model.sig", keys_of(pair))


def test_bytes_that_are_no_signature(tmp_path: Path) -> None:
    """Each single byte of the payload and the signature counts."""
    files, pair = {"manifest.json": "0" * 64}, make_pair(tmp_path)
    good = pair.signer.sign(files, "b")
    trust = keys_of(pair)
    for data in (b"", b"null", b"[]", good[:-1], b"\xff" + good, b"[" * 100_000):
        with pytest.raises(SignatureError):
            parse_signature(data, "model.sig", trust)
    document = json.loads(good)
    payload = bytearray(base64.b64decode(document["dsseEnvelope"]["payload"]))
    for at in range(len(payload)):
        payload[at] ^= 1
        document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        with pytest.raises(SignatureError, match="its signature is not of the key"):
            parse_signature(json.dumps(document).encode(), "model.sig", trust)
        payload[at] ^= 1


STATEMENTS: dict[str, Changed] = {
    "of another type": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "of another predicate": lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
    "of parts of files": lambda s: s["predicate"]["serialization"].update(method="shards"),
    "of another hash": lambda s: s["predicate"]["serialization"].update(hash_type="blake3"),
    "a file by another hash": lambda s: s["predicate"]["resources"][0].update(algorithm="blake3"),
    "a file twice": lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
    "a file outside": lambda s: s["predicate"]["resources"][0].update(name="../b"),
    "a file less": lambda s: s["predicate"]["resources"].pop(),
    "another order": lambda s: s["predicate"]["resources"].reverse(),
    "no subject": lambda s: s.update(subject=[]),
    "two subjects": lambda s: s.update(subject=s["subject"] * 2),
    "a fraction": lambda s: s["predicate"].update(more=1.5),
}


@pytest.mark.parametrize("change", STATEMENTS)
def test_another_statement_is_refused(change: str) -> None:
    """Also one that an accepted signer has signed."""
    made = json.loads(statement_of({"manifest.json": "0" * 64, "b": "1" * 64}, "b"))
    assert signed_files(json.dumps(made).encode()) == {"manifest.json": "0" * 64, "b": "1" * 64}
    STATEMENTS[change](made)
    with pytest.raises(ValueError, match=r"^(it|an|its|1\.5) "):
        signed_files(json.dumps(made).encode())


def test_a_signature_without_the_manifest_is_refused(tmp_path: Path) -> None:
    """It would say nothing of what a start reads. A file of it that is left out is not signed."""
    pair = make_pair(tmp_path)
    with pytest.raises(SignatureError, match=r"manifest\.json is not among the files"):
        pair.signer.sign({"model.tensors": "0" * 64}, "b")
    names = {"manifest.json": "0" * 64} | {f"{name}/x": "1" * 64 for name in IGNORED}
    made = parse_signature(pair.signer.sign(names, "s3://bucket/model/"), "s", keys_of(pair))
    assert set(made.files) == {"manifest.json"}


@pytest.mark.parametrize("case", [
    "root", "intermediate", "code signing", "expired", "other root", "no intermediate",
    "no signing", "no usage", "no authority", "another key", "a key alone",
])  # fmt: skip
def test_certificates_as_model_signing_judges_them(tmp_path: Path, case: str) -> None:
    """The same verdict on the same file, and who it was where it is a good one."""
    bundle = tmp_path / "bundle"
    files, pair = make_directory(bundle), make_pair(tmp_path)
    root = Authority("the root")
    issuer = root
    if case in {"intermediate", "no intermediate", "no authority"}:
        issuer = Authority("the intermediate", root, ca=case != "no authority")
    usage = {"code signing": "code", "no signing": "none", "no usage": None}.get(case, "signature")
    chain = issuer.issue(pair, days=-1 if case == "expired" else 1, usage=usage)
    if case == "no intermediate":
        chain = chain[: chain.index(b"-----END CERTIFICATE-----") + 26]
    (tmp_path / "chain.pem").write_bytes(chain)
    if case == "another key":
        with pytest.raises(ConfigurationError, match="is not that of the key"):
            ModelSigner.read(make_pair(tmp_path, "x").private, tmp_path / "chain.pem")
        return
    signer = ModelSigner.read(pair.private, tmp_path / "chain.pem")
    if case == "a key alone":
        signer = pair.signer
    (bundle / "model.sig").write_bytes(signer.sign(files, str(bundle)))
    trusted = Authority("the root") if case == "other root" else root
    (tmp_path / "roots.pem").write_bytes(trusted.pem)
    code, said = model_signing(
        "verify", "certificate", bundle, "--signature", bundle / "model.sig",
        "--certificate_chain", tmp_path / "roots.pem",
    )  # fmt: skip
    if case in {"root", "intermediate", "code signing", "expired"}:
        assert code == 0, said
        by = read(bundle / "model.sig", roots(trusted)).by
        assert (by.kind, by.subject) == ("certificate", "CN=a signer")
        assert by == signer.by
        # The key that is in the certificate may be given instead of what is above it.
        assert read(bundle / "model.sig", keys_of(pair)).by.kind == "key"
    else:
        assert code != 0, said
        with pytest.raises(SignatureError):
            read(bundle / "model.sig", roots(trusted))


def test_a_certificate_beside_another_keys_signature(tmp_path: Path) -> None:
    """A good certificate is public: everybody can put it into a signature of his own."""
    pair, other, root = make_pair(tmp_path), make_pair(tmp_path, "other"), Authority("the root")
    (tmp_path / "chain.pem").write_bytes(root.issue(pair))
    files = {"manifest.json": "0" * 64}
    good = json.loads(ModelSigner.read(pair.private, tmp_path / "chain.pem").sign(files, "b"))
    bad = json.loads(other.signer.sign(files, "b"))
    bad["verificationMaterial"] = good["verificationMaterial"]
    with pytest.raises(SignatureError, match="not of its certificate's key"):
        parse_signature(json.dumps(bad).encode(), "model.sig", roots(root))
    for der in (b"", b"0", base64.b64decode(_first(good))[:-9]):
        _certificates(good)[0]["rawBytes"] = base64.b64encode(der).decode()
        with pytest.raises(SignatureError, match=r"model\.sig is not accepted"):
            parse_signature(json.dumps(good).encode(), "model.sig", roots(root))
    with pytest.raises(ConfigurationError, match="one or more certificates"):
        TrustedCertificates.parse(Secret(pair.public.read_bytes(), "the file"))


def _certificates(document: dict[str, Any]) -> Any:
    return document["verificationMaterial"]["x509CertificateChain"]["certificates"]


def _first(document: dict[str, Any]) -> str:
    return str(_certificates(document)[0]["rawBytes"])
