"""How does a file of OpenSSF's model signing hold a signature?

As a Sigstore bundle with a DSSE envelope. Sigstore's format, version 0.3
(https://docs.sigstore.dev/about/bundle/), has the key's or the certificates' part and the envelope.
DSSE (https://github.com/secure-systems-lab/dsse, version
1) says which bytes are signed: the payload together with its type.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.bundle.json_fields import JsonFields

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_MOST_CERTIFICATES = 8


@dataclass(frozen=True)
class Envelope:
    """A signature as it was read. Nothing of it is believed."""

    payload: bytes
    signature: bytes
    key_hint: str | None
    """The fingerprint of the public key, where it was signed with a key alone."""
    certificates: tuple[bytes, ...]
    """DER; the signer's first. Empty where it was signed with a key alone, or keyless."""
    keyless: bytes | None = None
    """The whole file, where Sigstore's keyless signing made it: for its own library."""

    @property
    def signed(self) -> bytes:
        """The bytes that the signature is of."""
        return signed_bytes(self.payload)

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """From the content of a signature's file. Raises ValueError for anything else."""
        document = JsonFields(read_json(data, strict=True), "the document")
        if document.text("mediaType") != MEDIA_TYPE:
            raise ValueError(f"its mediaType is not {MEDIA_TYPE!r}")
        dsse = JsonFields(document.get("dsseEnvelope"), "its dsseEnvelope")
        if dsse.text("payloadType") != PAYLOAD_TYPE:
            raise ValueError(f"its payloadType is not {PAYLOAD_TYPE!r}")
        signatures = dsse.items("signatures")
        if len(signatures) != 1:
            raise ValueError(f"it has {len(signatures)} signatures, not one")
        material = JsonFields(document.get("verificationMaterial"), "its verificationMaterial")
        keyless = "certificate" in material.content
        hint, certificates = (None, ()) if keyless else _material(material)
        return cls(
            payload=_bytes(dsse, "payload"),
            signature=_bytes(JsonFields(signatures[0], "its signature"), "sig"),
            key_hint=hint,
            certificates=certificates,
            keyless=data if keyless else None,
        )


def envelope_text(payload: bytes, signature: bytes, material: dict[str, Any]) -> bytes:
    """The content of a signature's file. `material`: `key_material` or `certificate_material`."""
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {**material, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _text(signature), "keyid": ""}],
        },
    }
    return json.dumps(document).encode()


def key_material(fingerprint: str) -> dict[str, Any]:
    """What names the key of a signature that was made with a key alone."""
    return {"publicKey": {"hint": fingerprint}}


def certificate_material(certificates: Sequence[bytes]) -> dict[str, Any]:
    """The signer's certificate and those above it, each in DER."""
    chain = [{"rawBytes": _text(certificate)} for certificate in certificates]
    return {"x509CertificateChain": {"certificates": chain}}


def signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: both lengths are part of what is signed."""
    kind = PAYLOAD_TYPE.encode()
    return b" ".join((b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload))


def _material(material: JsonFields) -> tuple[str | None, tuple[bytes, ...]]:
    """(hint of the key, certificates); one of them is there."""
    if "x509CertificateChain" in material.content:
        chain = JsonFields(material.get("x509CertificateChain"), "its x509CertificateChain")
        certificates = chain.items("certificates")
        if not 0 < len(certificates) <= _MOST_CERTIFICATES:
            raise ValueError(
                f"it has {len(certificates)} certificates, not 1 to {_MOST_CERTIFICATES}"
            )
        return None, tuple(
            _bytes(JsonFields(one, "a certificate"), "rawBytes") for one in certificates
        )
    key = JsonFields(material.get("publicKey"), "its publicKey")
    # Releases of model-signing before 1.0 wrote no hint.
    return key.text("hint") if key.content.get("hint") is not None else None, ()


def _bytes(fields: JsonFields, name: str) -> bytes:
    try:
        return base64.b64decode(fields.text(name), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its {name!r} is not base64") from error


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
