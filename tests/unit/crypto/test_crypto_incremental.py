"""Is a chunk opened in strips what libsodium makes of it whole, and refused where that refuses?"""

from __future__ import annotations

import random

import pytest

from tensorserve.crypto.backends import sodium_box
from tensorserve.format import STRIP_ALIGNMENT, StripOpener, TagMismatchError, opens_strips
from unit.crypto.test_crypto_backends import forgeries, needs_avx512, sealed

pytestmark = needs_avx512
LENGTHS = [1, 15, 16, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 1000, 1055, 4096, 16384, 16385]
LENGTHS += [40_000, 65_536 + 7, 300_001]


def cut(length: int, chance: random.Random) -> list[tuple[int, int]]:
    """The chunk in strips, in any order."""
    places = range(STRIP_ALIGNMENT, length, STRIP_ALIGNMENT)
    inner = sorted(chance.sample(places, min(len(places), chance.randrange(7))))
    strips = list(zip([0, *inner], [*inner, length], strict=True))
    chance.shuffle(strips)
    return strips


def opened(
    cipher: bytes, tag: bytes, nonce: bytes, key: bytes, strips: list[tuple[int, int]], shift: int
) -> bytes:
    """In place where `shift` is odd; raises TagMismatchError."""
    opener = StripOpener(key, nonce)
    source = bytearray(bytes(shift) + cipher)
    out = source if shift % 2 else bytearray(len(source))
    for start, stop in strips:
        part = slice(shift + start, shift + stop)
        opener.open(start, memoryview(source)[part], memoryview(out)[part])
    opener.check(tag)
    assert out[:shift] == bytes(shift)
    return bytes(out[shift:])


def test_it_is_there_where_the_processor_can() -> None:
    """Else this whole file would test nothing."""
    assert opens_strips()


@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_strips_in_any_order_make_the_chunk(fill: str) -> None:
    """Cut anywhere, at any address, into other memory and in place."""
    chance = random.Random(fill)
    for length in LENGTHS:
        for round_ in range(8):
            key, nonce = chance.randbytes(32), chance.randbytes(24)
            byte = {"zeros": b"\0", "ones": b"\xff"}.get(fill)
            plain = chance.randbytes(length) if byte is None else byte * length
            cipher, tag = sealed(sodium_box(), plain, nonce, key)
            strips = cut(length, chance)
            assert opened(cipher, tag, nonce, key, strips, round_) == plain, (length, strips)


def test_every_single_bit_counts() -> None:
    """A flip anywhere in ciphertext, tag, nonce or key is refused."""
    chance = random.Random(7)
    key, nonce, plain = chance.randbytes(32), chance.randbytes(24), chance.randbytes(700)
    cipher, tag = sealed(sodium_box(), plain, nonce, key)
    strips = [(0, 128), (320, 700), (128, 320)]
    parts = [cipher, tag, nonce, key]
    for _, changed in forgeries(parts):
        with pytest.raises(TagMismatchError):
            opened(*changed, strips=strips, shift=0)
    assert opened(*parts, strips=strips, shift=0) == plain


def test_strips_that_changed_places_are_refused() -> None:
    """Each is sealed for its own place."""
    chance = random.Random(9)
    key, nonce, plain = chance.randbytes(32), chance.randbytes(24), chance.randbytes(512)
    cipher, tag = sealed(sodium_box(), plain, nonce, key)
    exchanged = cipher[256:] + cipher[:256]
    with pytest.raises(TagMismatchError):
        opened(exchanged, tag, nonce, key, [(0, 256), (256, 512)], 0)
