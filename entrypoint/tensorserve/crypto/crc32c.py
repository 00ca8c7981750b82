"""Which CRC32C has a short message? Google's services compare it, against damage on the way.

CRC-32C (Castagnoli, RFC 3720 section 12.1): reflected polynomial 0x82F63B78. For some hundred
bytes: a table and a loop.
"""

from __future__ import annotations

_POLYNOMIAL = 0x82F63B78


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = tuple(map(_entry, range(256)))


def crc32c(data: bytes) -> int:
    """The checksum of `data`, 0 to 2^32 - 1."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
