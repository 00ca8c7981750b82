"""Does our own secretbox (secretbox.c) do bit for bit what libsodium does?"""

from __future__ import annotations

import ctypes
import platform
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorserve.crypto import backends as boxes
from tensorserve.crypto.backends import Box, fastest_box, own_box, sodium_box

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
CAN = platform.machine() == "x86_64" and "avx512ifma" in CPU
# tests/conftest.py finds those that were skipped by this reason, and says so.
needs_avx512 = pytest.mark.skipif(not CAN, reason="this processor has no AVX-512 IFMA")

# Every way through both primitives: the first 32 bytes, whole rounds of 256 and 1,024, each rest.
LENGTHS = [*range(600), *range(1000, 1100), 2048, 2080, 4095, 65_536, 2 * 1024**2, 2 * 1024**2 + 1]


def sealed(box: Box, plain: bytes, nonce: bytes, key: bytes) -> tuple[bytes, bytes]:
    """(ciphertext, tag)."""
    out, tag = ctypes.create_string_buffer(len(plain) or 1), ctypes.create_string_buffer(16)
    box.seal(out, tag, plain, len(plain), nonce, key)
    return out.raw[: len(plain)], tag.raw


def opened(box: Box, cipher: bytes, tag: bytes, nonce: bytes, key: bytes) -> bytes | None:
    """The plaintext, or None where the tag does not fit; then nothing was written."""
    out = ctypes.create_string_buffer(b"\xaa" * len(cipher), len(cipher) or 1)
    if box.open(out, cipher, tag, len(cipher), nonce, key):
        assert out.raw[: len(cipher)] == b"\xaa" * len(cipher)
        return None
    return out.raw[: len(cipher)]


def own() -> Box:
    box = own_box()
    assert box is not None
    return box


@needs_avx512
def test_it_is_built_and_taken_where_the_processor_can() -> None:
    """`make venv` has a compiler; else this whole file would test nothing."""
    assert fastest_box().name == "AVX-512"


@needs_avx512
@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_it_seals_and_opens_as_libsodium_does_at_every_length(fill: str) -> None:
    """All zeros and all ones are where Poly1305's carries go wrong if they ever do."""
    chance = random.Random(fill)
    for length in LENGTHS:
        key, nonce = chance.randbytes(32), chance.randbytes(24)
        byte = {"zeros": b"\0", "ones": b"\xff"}.get(fill)
        plain = chance.randbytes(length) if byte is None else byte * length
        cipher, tag = sealed(sodium_box(), plain, nonce, key)
        assert sealed(own(), plain, nonce, key) == (cipher, tag), length
        assert opened(own(), cipher, tag, nonce, key) == plain, length


@needs_avx512
def test_ciphertexts_at_the_fields_edges_have_libsodiums_tags() -> None:
    """Poly1305 works modulo 2^130 - 5: sums that end just below, at and above it."""
    chance = random.Random(5)
    edges = [b"\xff" * 16, b"\xfb" + b"\xff" * 15, b"\xfa" + b"\xff" * 15, b"\0" * 16, b"\x05"]
    for _ in range(3000):
        key, nonce = chance.randbytes(32), chance.randbytes(24)
        cipher = b"".join(chance.choices(edges, k=chance.randrange(1, 60)))
        # As if this were the ciphertext: the tag covers nothing else.
        plain = opened_without_tag(cipher, nonce, key)
        expected = sealed(sodium_box(), plain, nonce, key)
        assert expected[0] == cipher
        assert sealed(own(), plain, nonce, key) == expected


def opened_without_tag(cipher: bytes, nonce: bytes, key: bytes) -> bytes:
    """The key stream, XORed over `cipher`."""
    stream, _ = sealed(sodium_box(), bytes(len(cipher)), nonce, key)
    return bytes(a ^ b for a, b in zip(cipher, stream, strict=True))


def forgeries(parts: list[bytes]) -> Iterator[tuple[tuple[int, int], list[bytes]]]:
    """((part, bit), `parts` with that bit flipped), for each bit of all of them."""
    for which, part in enumerate(parts):
        for bit in range(8 * len(part)):
            forged = bytearray(part)
            forged[bit // 8] ^= 1 << bit % 8
            yield (which, bit), [*parts[:which], bytes(forged), *parts[which + 1 :]]


@needs_avx512
def test_every_single_bit_counts() -> None:
    """A flip anywhere in ciphertext, tag, nonce or key is refused, and nothing is written."""
    chance = random.Random(7)
    key, nonce, plain = chance.randbytes(32), chance.randbytes(24), chance.randbytes(1400)
    cipher, tag = sealed(own(), plain, nonce, key)
    parts = [cipher, tag, nonce, key]
    for which, changed in forgeries(parts):
        assert opened(own(), *changed) is None, which
    assert opened(own(), *parts) == plain


@needs_avx512
def test_any_address_is_fine_and_only_the_output_is_written() -> None:
    """Ciphertext stands in files at no alignment, and ends where the next header begins."""
    chance = random.Random(11)
    key, nonce = chance.randbytes(32), chance.randbytes(24)
    for length in (31, 1000, 1056, 5000):
        for shift in range(65):
            plain = chance.randbytes(length)
            cipher, tag = sealed(sodium_box(), plain, nonce, key)
            memory = bytearray(b"a" * shift + cipher + b"z" * 64)
            view = (ctypes.c_char * length).from_buffer(memory, shift)
            assert own().open(view, view, tag, length, nonce, key) == 0
            del view
            assert memory == b"a" * shift + plain + b"z" * 64


def test_without_it_libsodium_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older processor, or a wheel that was made without a compiler."""
    boxes.fastest_box.cache_clear()
    monkeypatch.setattr(boxes, "own_box", lambda: None)
    assert fastest_box().name == "libsodium"
    boxes.fastest_box.cache_clear()


@needs_avx512
def test_one_that_computes_wrongly_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use compares it with libsodium."""
    right = boxes._sample
    monkeypatch.setattr(
        boxes, "_sample", lambda box: (b"", b"") if box.name == "AVX-512" else right(box)
    )
    boxes.own_box.cache_clear()
    assert own_box() is None
    boxes.own_box.cache_clear()
