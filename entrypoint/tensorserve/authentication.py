"""Who wrote a manifest? Its MAC, and what is sealed in it, under keys made of the model's key.

HKDF-SHA256 (RFC 5869) with a salt of the manifest's own makes two keys of the model's 32 bytes, so
that neither is used for two things: one for HMAC-SHA256 over the document, one for the boxes
(XSalsa20-Poly1305, as the weights' own) that hold the tensors' digests. docs/bundle-format.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensorserve.errors import CorruptError
from tensorserve.format import PasswordHash, open_chunk, seal_chunk
from tensorserve.format.box import NONCE_SIZE, TAG_SIZE
from tensorserve.format.crypto import SALT_SIZE as PASSPHRASE_SALT_BYTES
from tensorserve.keys import ModelKey
from tensorserve.keys.hkdf import hkdf_sha256

SCHEME = "hkdf-sha256, hmac-sha256"
SALT_BYTES = MAC_BYTES = DIGEST_BYTES = 32
_MAC_INFO = b"tensorserve manifest v2 mac"
_DIGESTS_INFO = b"tensorserve manifest v2 digests"


class UnknownMacError(CorruptError):
    """A manifest's MAC does not fit: another key made it, or nobody's."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """All of a manifest that is read before its MAC fits: how the keys come from the model's."""

    salt: bytes
    derivation: PasswordHash | None
    """How the model's key comes from its passphrase; None: it is no passphrase's."""

    @classmethod
    def fresh(cls, derivation: PasswordHash | None) -> Parameters:
        """For a new manifest."""
        return cls(os.urandom(SALT_BYTES), derivation)

    @classmethod
    def from_json(cls, document: object) -> Parameters:
        """From what stands in a manifest. ValueError for what is none of ours."""
        if not isinstance(document, Mapping) or document.get("scheme") != SCHEME:
            raise ValueError(f"its authentication is not {SCHEME!r}")
        derivation = None
        if (stated := document.get("passphrase")) is not None:
            if not isinstance(stated, Mapping):
                raise ValueError("'passphrase' of its authentication is not an object")
            # Bounded where they are used (format.crypto.derive_key).
            derivation = PasswordHash(
                passes=_natural(stated, "passes"),
                memory=_natural(stated, "memory"),
                salt=_hex(stated, "salt", PASSPHRASE_SALT_BYTES),
            )
        return cls(_hex(document, "salt", SALT_BYTES), derivation)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest, but for the MAC."""
        stated = None
        if self.derivation is not None:
            passes, memory = self.derivation.passes, self.derivation.memory
            stated = {"passes": passes, "memory": memory, "salt": self.derivation.salt.hex()}
        return {"scheme": SCHEME, "salt": self.salt.hex(), "passphrase": stated}

    def keys(self, key: ModelKey, asked_by: str) -> ManifestKeys:
        """The two keys. Raises as ModelKey.for_parameters does."""
        secret = key.for_parameters(self.derivation, asked_by)
        return ManifestKeys(
            hkdf_sha256(secret, salt=self.salt, info=_MAC_INFO),
            hkdf_sha256(secret, salt=self.salt, info=_DIGESTS_INFO),
        )


class ManifestKeys:
    """The keys of one manifest."""

    def __init__(self, mac: bytes, digests: bytes) -> None:
        self._mac = mac
        self._digests = digests

    def mac(self, document: Mapping[str, Any]) -> str:
        """HMAC-SHA256 (hex) over all of `document` but the MAC in it."""
        return hmac.digest(self._mac, mac_input(document), hashlib.sha256).hex()

    def fits(self, document: Mapping[str, Any]) -> bool:
        """Whether the document's MAC is this key's, of this content. ValueError: it has none."""
        stated = _hex(document["authentication"], "mac", MAC_BYTES).hex()
        return hmac.compare_digest(stated, self.mac(document))

    def seal_digests(self, digests: tuple[bytes, ...]) -> str:
        """The tensors' SHA-256 (32 bytes each) in a box: base64 of nonce, tag and what is sealed.

        Each box has a random nonce under a key of this one manifest.
        """
        data = bytearray(b"".join(digests))
        nonce = os.urandom(NONCE_SIZE)
        with memoryview(data) as view:
            tag = seal_chunk(self._digests, nonce, view, view)
        return base64.b64encode(nonce + tag + data).decode()

    def open_digests(self, sealed: str) -> tuple[bytes, ...]:
        """The reverse. ValueError for what is no such box, TagMismatchError for another key's."""
        try:
            box = base64.b64decode(sealed, validate=True)
        except binascii.Error as error:
            raise ValueError("its digests are not base64") from error
        nonce, tag = box[:NONCE_SIZE], box[NONCE_SIZE : NONCE_SIZE + TAG_SIZE]
        data = bytearray(box[NONCE_SIZE + TAG_SIZE :])
        if len(tag) != TAG_SIZE or len(data) % DIGEST_BYTES:
            raise ValueError("its digests are cut off")
        with memoryview(data) as view:
            open_chunk(self._digests, nonce, tag, view, view)
        return tuple(
            bytes(data[at : at + DIGEST_BYTES]) for at in range(0, len(data), DIGEST_BYTES)
        )


def mac_input(document: Mapping[str, Any]) -> bytes:
    """What the MAC is over: the document without it, as JSON of one form only.

    Members sorted by name, no white space, ASCII with \\u escapes. Documents have no fractions and
    no name twice (manifest.py refuses them), so two that differ never come out alike; one that was
    indented anew comes out the same.
    """
    stated = document["authentication"]
    bare = {name: value for name, value in stated.items() if name != "mac"}
    whole = {**document, "authentication": bare}
    return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _natural(document: Mapping[str, Any], name: str) -> int:
    value = document.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name!r} of its authentication is not a natural number")
    return value


def _hex(document: Mapping[str, Any], name: str, length: int) -> bytes:
    value = document.get(name)
    if not isinstance(value, str) or len(value) != 2 * length:
        raise ValueError(f"{name!r} of its authentication is not {length} bytes in hex")
    # Strict: bytes.fromhex takes spaces.
    return binascii.unhexlify(value.encode("ascii", "replace"))
