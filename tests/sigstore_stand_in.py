"""A private Sigstore: an authority that issues like Fulcio, its log, and one that keeps like Rekor.

`with Sigstore() as instance:`. The real client signs against it; what it made is verified with
`instance.trust_root` alone. Who asks is believed: tokens are not signed.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from http_server import Handler, HttpServer
from model_signers import NO_USAGE
from tensorserve.packing.keyless_signer import KeylessSigner

ISSUER = "https://issuer.example"
_START = "2020-01-01T00:00:00Z"
_SCTS = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_OIDC_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_MINUTE = datetime.timedelta(minutes=1)


def token(identity: str, minutes: int = 5) -> str:
    """An OIDC token of `identity`; negative: it has expired."""
    now = datetime.datetime.now(datetime.UTC)
    claims = {"iss": ISSUER, "aud": "sigstore", "sub": identity}
    claims |= {"iat": now - 60 * _MINUTE, "exp": now + minutes * _MINUTE}
    return jwt.encode(claims, "not looked at, but of 32 bytes or more", algorithm="HS256")


class _Key:
    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP256R1())
        self.der = self._private.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
        self.id = hashlib.sha256(self.der).digest()

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data, ec.ECDSA(hashes.SHA256()))

    def instance(self, url: str) -> dict[str, Any]:
        """A log in a trust root."""
        return {
            "baseUrl": url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": _text(self.der),
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": _START},
            },
            "logId": {"keyId": _text(self.id)},
        }


class _Answers(Handler):
    def do_GET(self) -> None:
        """What model_signing asks the issuer before it looks at its token."""
        assert self.path == "/.well-known/openid-configuration"
        ends = {"authorization_endpoint": self.owner.url, "token_endpoint": self.owner.url}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(ends).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.body())
        if self.owner.refuses:
            self.answer(403, {"Content-Type": "application/json"}, b'{"message": "no"}')
            return
        if self.path == "/api/v2/signingCert":
            bearer = self.headers["Authorization"].removeprefix("Bearer ")
            made = self.owner.certify(bearer, base64.b64decode(asked["certificateSigningRequest"]))
        else:
            assert self.path == "/api/v1/log/entries"
            made = self.owner.keep(json.loads(asked["spec"]["proposedContent"]["envelope"]), asked)
        self.answer(201, {"Content-Type": "application/json"}, json.dumps(made).encode())


class Sigstore(HttpServer):
    """Both services at one address."""

    identity = "releases@example.org"

    def __init__(self) -> None:
        super().__init__(_Answers)
        self.logged_after = datetime.timedelta(0)
        """How long the log takes: certificates are valid for ten minutes."""
        self.refuses = False
        """Whether each request is answered with 403."""
        self._log, self._certificate_log = _Key(), _Key()
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a Sigstore")])
        self._root = (
            _valid(x509.CertificateBuilder(), 60 * _MINUTE)
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
            .add_extension(x509.KeyUsage(**NO_USAGE | {"key_cert_sign": True}), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), False)
            .sign(self._key, hashes.SHA256())
        )

    def certify(self, bearer: str, request: bytes) -> dict[str, Any]:
        """Fulcio's answer: a certificate with the certificate log's promise in it, and the root."""
        subject = jwt.decode(bearer, options={"verify_signature": False})["sub"]
        name = x509.UniformResourceIdentifier if "://" in subject else x509.RFC822Name
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _valid(x509.CertificateBuilder(), 10 * _MINUTE)
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(x509.load_pem_x509_csr(request).public_key())
            .add_extension(x509.KeyUsage(**NO_USAGE | {"digital_signature": True}), True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
            .add_extension(above, False)
            .add_extension(x509.SubjectAlternativeName([name(subject)]), True)
            .add_extension(x509.UnrecognizedExtension(_OIDC_ISSUER, ISSUER.encode()), False)
        )
        before = builder.sign(self._key, hashes.SHA256()).tbs_certificate_bytes
        promise = x509.UnrecognizedExtension(_SCTS, self._promise(before))
        leaf = builder.add_extension(promise, False).sign(self._key, hashes.SHA256())
        chain = [one.public_bytes(Encoding.PEM).decode() for one in (leaf, self._root)]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}

    def _promise(self, certificate: bytes) -> bytes:
        """RFC 6962's list of one signed certificate timestamp, as an extension's value."""
        milliseconds = int(datetime.datetime.now().timestamp() * 1000)
        above = hashlib.sha256(
            self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ).digest()
        entry = above + len(certificate).to_bytes(3, "big") + certificate
        signature = self._certificate_log.sign(
            struct.pack("!BBQH", 0, 0, milliseconds, 1) + entry + b"\0\0"
        )
        head = struct.pack("!B32sQHBB", 0, self._certificate_log.id, milliseconds, 0, 4, 3)
        one = head + len(signature).to_bytes(2, "big") + signature
        listed = struct.pack("!HH", len(one) + 2, len(one)) + one
        assert len(listed) < 0x80
        return bytes((4, len(listed))) + listed

    def keep(self, envelope: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        """Rekor's answer: the entry, the second of its log, with proof, checkpoint and promise."""
        payload = hashlib.sha256(base64.b64decode(envelope["payload"])).hexdigest()
        verifier = asked["spec"]["proposedContent"]["verifiers"][0]
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": "0" * 64},
            "payloadHash": {"algorithm": "sha256", "value": payload},
            "signatures": [{"signature": envelope["signatures"][0]["sig"], "verifier": verifier}],
        }
        body = _canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        first = hashlib.sha256(b"\0another entry").digest()
        root = hashlib.sha256(b"\1" + first + hashlib.sha256(b"\0" + body).digest()).digest()
        note = f"a log\n2\n{_text(root)}\n"
        signed = _text(self._log.id[:4] + self._log.sign(note.encode()))
        entry = {
            "body": _text(body),
            "integratedTime": int((datetime.datetime.now() + self.logged_after).timestamp()),
            "logID": self._log.id.hex(),
            "logIndex": 1,
        }
        promise = self._log.sign(_canonical(entry))
        proof = {
            "logIndex": 1,
            "rootHash": root.hex(),
            "treeSize": 2,
            "hashes": [first.hex()],
            "checkpoint": f"{note}\n\N{EM DASH} log {signed}\n",
        }
        verification = {"inclusionProof": proof, "signedEntryTimestamp": _text(promise)}
        return {"an id": entry | {"verification": verification}}

    def signer(self, directory: Path, identity: str = identity) -> KeylessSigner:
        """Who signs with a new token of `identity`; writes both files to `directory`."""
        (directory / "token").write_text(token(identity))
        (directory / "config.json").write_text(self.trust_config)
        return KeylessSigner.read(str(directory / "token"), directory / "config.json")

    def settings(self, directory: Path) -> dict[str, str]:
        """Of a server that asks for a signature of `identity`."""
        (directory / "root.json").write_text(self.trust_root)
        return {
            "TENSORSERVE_SIGNATURE_IDENTITY": self.identity,
            "TENSORSERVE_SIGNATURE_ISSUER": ISSUER,
            "TENSORSERVE_SIGNATURE_TRUST_ROOT_FILE": str(directory / "root.json"),
        }

    @property
    def trust_root(self) -> str:
        """trusted_root.json"""
        return json.dumps(self._trust_root())

    @property
    def trust_config(self) -> str:
        """The client trust configuration: the trust root, and where the services are."""
        service = {"url": self.url, "majorApiVersion": 1, "operator": "a test"}
        services = [service | {"validFor": {"start": _START}}]
        signing = {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": services,
            "oidcUrls": services,
            "rekorTlogUrls": services,
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaUrls": [],
            "tsaConfig": {"selector": "ANY"},
        }
        return json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                "trustedRoot": self._trust_root(),
                "signingConfig": signing,
            }
        )

    def _trust_root(self) -> dict[str, Any]:
        root = {"rawBytes": _text(self._root.public_bytes(Encoding.DER))}
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self._log.instance(self.url)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "a test", "commonName": "a Sigstore"},
                    "uri": self.url,
                    "certChain": {"certificates": [root]},
                    "validFor": {"start": _START},
                }
            ],
            "ctlogs": [self._certificate_log.instance(self.url)],
            "timestampAuthorities": [],
        }


def _valid(builder: x509.CertificateBuilder, period: datetime.timedelta) -> Any:
    now = datetime.datetime.now(datetime.UTC)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - _MINUTE)
        .not_valid_after(now + period)
    )


def _canonical(value: object) -> bytes:
    """RFC 8785, for what is here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
