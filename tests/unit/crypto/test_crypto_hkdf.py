"""HKDF: the vectors of RFC 5869 (appendix A), and what the two keys of a manifest are made of."""

from __future__ import annotations

import pytest

from tensorserve.crypto.hkdf import hkdf_sha256

VECTORS = {
    "A.1": (
        *(bytes([0x0B] * 22), bytes(range(0x0D)), bytes(range(0xF0, 0xFA))),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    "A.2": (
        *(bytes(range(0x50)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100))),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e"
        "590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    "A.3": (
        *(bytes([0x0B] * 22), b"", b""),
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
}


@pytest.mark.parametrize("case", VECTORS)
def test_the_vectors_of_the_rfc_come_out(case: str) -> None:
    """SHA-256: basic, long, and without salt and info."""
    secret, salt, info, expected = VECTORS[case]
    length = len(expected) // 2
    assert hkdf_sha256(secret, salt=salt, info=info, length=length).hex() == expected


@pytest.mark.parametrize("length", [0, -1, 8161])
def test_lengths_that_cannot_be_are_refused(length: int) -> None:
    """The counter has one byte."""
    with pytest.raises(ValueError, match="8160"):
        hkdf_sha256(b"x", salt=b"", info=b"", length=length)
