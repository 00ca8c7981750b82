"""How is a manifest authenticated: which keys, which MAC, and how are the digests encrypted?

HKDF-SHA256 (RFC 5869) with the manifest's salt derives two keys from the model's 32-byte key: one
for HMAC-SHA256 over the document, one for the XSalsa20-Poly1305 boxes with the tensors' digests.
See docs/bundle-format.md.
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

from tensorserve.bundle.keys import ModelKey
from tensorserve.crypto.backends import NONCE_SIZE, TAG_SIZE
from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.crypto.secretbox import SALT_SIZE as PASSPHRASE_SALT_BYTES
from tensorserve.errors import CorruptError
from tensorserve.format import PasswordHash, open_chunk, seal_chunk

SCHEME = "hkdf-sha256, hmac-sha256"
SALT_BYTES = MAC_BYTES = DIGEST_BYTES = 32
_MAC_INFO = b"tensorserve manifest v2 mac"
_DIGESTS_INFO = b"tensorserve manifest v2 digests"


class UnknownMacError(CorruptError):
    """A manifest's MAC does not fit the key: another key made it, or the manifest was changed."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How a manifest's keys are derived. Nothing else of a manifest is read before its MAC."""

    salt: bytes
    derivation: PasswordHash | None
    """How the model's key is derived from a passphrase; None if it is not."""

    @classmethod
    def fresh(cls, derivation: PasswordHash | None) -> Parameters:
        """For a new manifest: a random salt."""
        return cls(os.urandom(SALT_BYTES), derivation)

    @classmethod
    def from_json(cls, document: object) -> Parameters:
        """From a manifest's `authentication` member. Raises ValueError if it is invalid."""
        if not isinstance(document, Mapping) or document.get("scheme") != SCHEME:
            raise ValueError(f"its authentication is not {SCHEME!r}")
        derivation = None
        if (stated := document.get("passphrase")) is not None:
            if not isinstance(stated, Mapping):
                raise ValueError("'passphrase' of its authentication is not an object")
            # crypto.secretbox.derive_key checks their bounds.
            derivation = PasswordHash(
                passes=_natural(stated, "passes"),
                memory=_natural(stated, "memory"),
                salt=_hex(stated, "salt", PASSPHRASE_SALT_BYTES),
            )
        return cls(_hex(document, "salt", SALT_BYTES), derivation)

    def to_json(self) -> dict[str, Any]:
        """The `authentication` member of a manifest, without the MAC."""
        stated = None
        if self.derivation is not None:
            passes, memory = self.derivation.passes, self.derivation.memory
            stated = {"passes": passes, "memory": memory, "salt": self.derivation.salt.hex()}
        return {"scheme": SCHEME, "salt": self.salt.hex(), "passphrase": stated}

    def keys(self, key: ModelKey, asked_by: str) -> ManifestKeys:
        """The manifest's keys. `asked_by` names it in errors, those of ModelKey.for_parameters."""
        secret = key.for_parameters(self.derivation, asked_by)
        return ManifestKeys(
            hkdf_sha256(secret, salt=self.salt, info=_MAC_INFO),
            hkdf_sha256(secret, salt=self.salt, info=_DIGESTS_INFO),
        )


class ManifestKeys:
    """The two keys of one manifest: for its MAC and for its digests."""

    def __init__(self, mac: bytes, digests: bytes) -> None:
        self._mac = mac
        self._digests = digests

    def mac(self, document: Mapping[str, Any]) -> str:
        """HMAC-SHA256 (hex) over `document` without its MAC."""
        return hmac.digest(self._mac, mac_input(document), hashlib.sha256).hex()

    def fits(self, document: Mapping[str, Any]) -> bool:
        """Whether the document's MAC is valid. Raises ValueError if it has none."""
        stated = _hex(document["authentication"], "mac", MAC_BYTES).hex()
        return hmac.compare_digest(stated, self.mac(document))

    def seal_digests(self, digests: tuple[bytes, ...]) -> str:
        """Encrypts the tensors' SHA-256 digests (32 bytes each): base64 of nonce, tag, ciphertext.

        The nonce (24 bytes) is random; the key is used for this manifest only.
        """
        data = bytearray(b"".join(digests))
        nonce = os.urandom(NONCE_SIZE)
        with memoryview(data) as view:
            tag = seal_chunk(self._digests, nonce, view, view)
        return base64.b64encode(nonce + tag + data).decode()

    def open_digests(self, sealed: str) -> tuple[bytes, ...]:
        """The reverse of seal_digests. Raises ValueError for invalid text or length,
        TagMismatchError for another key."""
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
    """The MAC's input: the document without its MAC, as canonical JSON.

    Members sorted by name, no white space, ASCII with \\u escapes. bundle/manifest.py refuses
    fractions and repeated names, so that different documents have different inputs. Indentation
    does not change the input.
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
    # Not bytes.fromhex, which accepts spaces.
    return binascii.unhexlify(value.encode("ascii", "replace"))
