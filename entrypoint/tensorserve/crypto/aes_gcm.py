"""How is a short secret sealed with AES-256-GCM (NIST SP 800-38D)?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12


def seal(key: bytes, secret: bytes, associated: bytes) -> bytes:
    """`secret` sealed with the 32-byte `key`: nonce (12 bytes, random), ciphertext, tag (16)."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + bytes(_cipher(key).encrypt(nonce, secret, associated))


def unseal(key: bytes, box: bytes, associated: bytes) -> bytes:
    """The reverse of `seal`. Raises ValueError for another key or other associated data."""
    from cryptography.exceptions import InvalidTag

    try:
        nonce, sealed = box[:_NONCE_BYTES], box[_NONCE_BYTES:]
        return bytes(_cipher(key).decrypt(nonce, sealed, associated))
    except InvalidTag as error:
        raise ValueError("the tag does not fit") from error


def _cipher(key: bytes) -> AESGCM:
    # Imported here: it takes some hundredths of a second, and most starts need none.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)
