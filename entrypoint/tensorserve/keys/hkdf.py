"""How do several keys for several purposes come from one? HKDF with SHA-256 (RFC 5869)."""

from __future__ import annotations

import hashlib
import hmac

_HASH_BYTES = 32
_MOST_BLOCKS = 255


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, length: int = _HASH_BYTES) -> bytes:
    """`length` bytes that depend on all of `secret`, `salt` and `info` (RFC 5869, extract, expand).

    Whoever has one of them learns nothing of those under another `info`, nor of `secret`.
    ValueError for more than 8160 bytes.
    """
    if not 0 < length <= _MOST_BLOCKS * _HASH_BYTES:
        raise ValueError(f"HKDF gives 1 to {_MOST_BLOCKS * _HASH_BYTES} bytes, not {length}")
    extracted = _hmac(salt or bytes(_HASH_BYTES), secret)
    made, block = b"", b""
    for number in range(1, -(-length // _HASH_BYTES) + 1):
        block = _hmac(extracted, block + info + bytes([number]))
        made += block
    return made[:length]


def _hmac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, hashlib.sha256)
