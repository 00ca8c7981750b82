"""Do chunks open as libsodium sealed them, and never otherwise?"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import libnacl
import pytest
from tensorizer import EncryptionParams

from tensorserve.crypto import backends
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import TagMismatchError, derive_key, nonce_at, open_chunk

KEY = bytes(range(32))
NONCE = bytes(range(100, 124))
PLAINTEXT = bytes(i % 253 for i in range(10_001))
_BOX = libnacl.crypto_secretbox(PLAINTEXT, NONCE, KEY)
TAG, CIPHERTEXT = _BOX[:16], _BOX[16:]


def test_a_chunk_opens_into_another_buffer() -> None:
    """The ciphertext may be read-only, as mapped files are; it stays as it is."""
    out = bytearray(len(CIPHERTEXT))

    open_chunk(KEY, NONCE, TAG, memoryview(CIPHERTEXT), memoryview(out))

    assert out == PLAINTEXT


def test_a_chunk_opens_in_place() -> None:
    """The same memory may be given as ciphertext and as output."""
    buffer = bytearray(b"before" + CIPHERTEXT + b"after")
    view = memoryview(buffer)[6:-5]

    open_chunk(KEY, NONCE, memoryview(TAG), view, view)

    assert buffer == b"before" + PLAINTEXT + b"after"


@pytest.mark.parametrize("what", ["key", "nonce", "tag", "ciphertext"])
def test_a_forged_chunk_is_refused_and_leaves_the_output_alone(what: str) -> None:
    """One bit in any of the four is enough, and no unauthenticated byte comes out."""
    parts = {"key": KEY, "nonce": NONCE, "tag": TAG, "ciphertext": CIPHERTEXT}
    parts[what] = parts[what][:-1] + bytes([parts[what][-1] ^ 1])
    out = bytearray(b"x" * len(CIPHERTEXT))

    with pytest.raises(TagMismatchError):
        open_chunk(
            parts["key"],
            parts["nonce"],
            parts["tag"],
            memoryview(parts["ciphertext"]),
            memoryview(out),
        )

    assert out == b"x" * len(CIPHERTEXT)


@pytest.mark.parametrize(
    ("key", "nonce", "tag", "room"),
    [
        (KEY[1:], NONCE, TAG, 0),
        (KEY, NONCE[1:], TAG, 0),
        (KEY, NONCE, TAG[1:], 0),
        (KEY, NONCE, TAG, 1),
        (KEY, NONCE, TAG, -1),
    ],
)
def test_lengths_that_do_not_fit_never_reach_libsodium(
    key: bytes, nonce: bytes, tag: bytes, room: int
) -> None:
    """C would read or write past the end."""
    out = memoryview(bytearray(len(CIPHERTEXT) + room))

    with pytest.raises(ValueError, match=r"bytes"):
        open_chunk(key, nonce, tag, memoryview(CIPHERTEXT), out)


def test_a_read_only_output_is_refused() -> None:
    """Bytes objects must never be written to."""
    with pytest.raises(BufferError):
        open_chunk(KEY, NONCE, TAG, memoryview(CIPHERTEXT), memoryview(bytes(len(CIPHERTEXT))))


def test_a_buffer_with_holes_is_refused() -> None:
    """libsodium writes contiguous bytes."""
    out = memoryview(bytearray(2 * len(CIPHERTEXT)))[::2]

    with pytest.raises(BufferError):
        open_chunk(KEY, NONCE, TAG, memoryview(CIPHERTEXT), out)


def test_a_buffer_is_free_again_after_opening() -> None:
    """An export left behind would keep a bytearray from ever being resized."""
    out = bytearray(len(CIPHERTEXT))
    with memoryview(out) as view:
        open_chunk(KEY, NONCE, TAG, memoryview(CIPHERTEXT), view)

    out.append(0)

    assert len(out) == len(CIPHERTEXT) + 1


def test_threads_open_chunks_of_one_buffer_side_by_side() -> None:
    """Chunks share nothing but the key."""
    count = 64
    boxes = [libnacl.crypto_secretbox(PLAINTEXT, nonce_at(NONCE, i), KEY) for i in range(count)]
    buffer = memoryview(bytearray(b"".join(backends[16:] for backends in boxes)))
    size = len(PLAINTEXT)

    def open_one(i: int) -> None:
        view = buffer[i * size : (i + 1) * size]
        open_chunk(KEY, nonce_at(NONCE, i), boxes[i][:16], view, view)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_one, range(count)))

    assert buffer == PLAINTEXT * count


@pytest.mark.parametrize(
    "first",
    [
        bytes(24),
        b"\xff" * 3 + bytes(21),
        b"\xff" * 23 + b"\x7f",
        b"\xff" * 24,
        b"\xfe" + b"\xff" * 23,
    ],
)
def test_nonces_count_up_as_libsodium_increments(first: bytes) -> None:
    """Little-endian, carrying through all 24 bytes, and around at the end."""
    expected = ctypes.create_string_buffer(first, 24)

    for i in range(5):
        assert nonce_at(first, i) == expected.raw
        libnacl.nacl.sodium_increment(expected, ctypes.c_size_t(24))


def test_a_key_is_derived_as_tensorizer_derives_it() -> None:
    """Same passphrase, salt and limits: same key."""
    theirs = EncryptionParams.from_string("pass phräse", opslimit=3, memlimit=65536, salt=b"s" * 16)

    ours = derive_key("pass phräse".encode(), salt=b"s" * 16, passes=3, memory=65536)

    assert ours == theirs.key


@pytest.mark.parametrize(
    ("passes", "memory"),
    [
        (1, 0),
        (1, 8191),
        (1, 4 * 2**30 + 1),
        (1, 2**63),
        (0, 8192),
        (2**16 + 1, 8192),
        (2**63, 8192),
        (17, 4 * 2**30),
    ],
)
def test_derivations_out_of_bounds_are_refused_before_any_work(passes: int, memory: int) -> None:
    """A forged header must not cost gigabytes or hours."""
    with pytest.raises(CorruptError, match="out of bounds"):
        derive_key(b"x", salt=bytes(16), passes=passes, memory=memory)


def test_a_salt_of_another_length_never_reaches_libsodium() -> None:
    """C would read past its end."""
    with pytest.raises(CorruptError):
        derive_key(b"x", salt=bytes(15), passes=1, memory=8192)


@pytest.fixture
def without_libsodium(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where no libsodium can be loaded."""

    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    forget = (backends.sodium, backends.own_box, backends.fastest_box)
    for cached in forget:
        cached.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.99")
    yield
    for cached in forget:
        cached.cache_clear()


@pytest.mark.usefixtures("without_libsodium")
def test_a_missing_libsodium_is_told_with_the_package_to_install() -> None:
    """The message names Debian's package."""
    out = memoryview(bytearray(len(CIPHERTEXT)))

    with pytest.raises(ConfigurationError, match="apt-get install libsodium23"):
        open_chunk(KEY, NONCE, TAG, memoryview(CIPHERTEXT), out)


@pytest.mark.parametrize(("left", "works"), [(90_000, True), (70_000, False), (None, True)])
def test_a_derivation_takes_no_more_memory_than_is_left(
    monkeypatch: pytest.MonkeyPatch, left: int | None, works: bool
) -> None:
    """A forged header would have the kernel end the container; now it ends with both figures."""
    monkeypatch.setattr("tensorserve.crypto.secretbox.available_bytes", lambda: left)
    if works:
        assert derive_key(b"x", salt=bytes(16), passes=1, memory=65536)
        return
    with pytest.raises(ConfigurationError, match="memory limit"):
        derive_key(b"x", salt=bytes(16), passes=1, memory=65536)
