"""How are several keys derived from one? HKDF with SHA-256 (RFC 5869)."""

from __future__ import annotations

import hashlib
import hmac

_HASH_BYTES = 32
_MOST_BLOCKS = 255


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, length: int = _HASH_BYTES) -> bytes:
    """`length` bytes derived from `secret`, `salt` and `info` (RFC 5869, extract and expand).

    A derived key reveals nothing about `secret` or about keys with another `info`. Raises
    ValueError unless `length` is 1 to 8160.
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
