"""A `StripOpener` made of libsodium's functions: the way of strips on any processor.

Our own cipher, which opens strips, needs AVX-512 IFMA. Without it the loader's code for strips
would not be tested. This class has the same interface, errors and plaintext; it keeps the sealed
bytes until it compares the tag.
"""

from __future__ import annotations

import ctypes
import threading

import pytest

from tensorserve.crypto.backends import sodium
from tensorserve.crypto.incremental import STRIP_ALIGNMENT
from tensorserve.crypto.secretbox import TagMismatchError
from tensorserve.loading import chunk_decryption

# secretbox: the key of Poly1305 is the first 32 bytes of XSalsa20's stream, the plaintext follows.
_HASH_KEY_BYTES = 32


class SodiumStrips:
    """See tensorserve.crypto.incremental.StripOpener."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._key, self._nonce = key, nonce
        self._sealed: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def open(self, offset: int, sealed: memoryview, out: memoryview) -> None:
        """Decrypt the bytes at `offset` of the chunk."""
        assert offset % STRIP_ALIGNMENT == 0
        assert len(sealed) == len(out)
        data = bytes(sealed)
        out[:] = self._stream(bytes(_HASH_KEY_BYTES) + data, offset // STRIP_ALIGNMENT)[
            _HASH_KEY_BYTES:
        ]
        with self._lock:
            assert offset not in self._sealed, "opened twice"
            self._sealed[offset] = data

    def check(self, tag: bytes) -> None:
        """Raises TagMismatchError unless the strips are the chunk of `tag`."""
        chunk, end = b"", 0
        for offset, data in sorted(self._sealed.items()):
            assert offset == end, "not all of the chunk was opened"
            chunk, end = chunk + data, end + len(data)
        key = self._stream(bytes(_HASH_KEY_BYTES), 0)
        size = ctypes.c_ulonglong(len(chunk))
        if sodium().crypto_onetimeauth_verify(bytes(tag), chunk, size, key):
            raise TagMismatchError("The authentication tag of a chunk does not fit.")

    def _stream(self, data: bytes, block: int) -> bytes:
        out = ctypes.create_string_buffer(len(data))
        size, first = ctypes.c_ulonglong(len(data)), ctypes.c_uint64(block)
        sodium().crypto_stream_xsalsa20_xor_ic(out, data, size, self._nonce, first, self._key)
        return out.raw


def use_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loader decrypt in strips, whatever the processor."""
    monkeypatch.setattr(chunk_decryption, "opens_strips", lambda: True)
    monkeypatch.setattr(chunk_decryption, "StripOpener", SodiumStrips)


def use_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the loader decrypt whole chunks alone, as with libsodium."""
    monkeypatch.setattr(chunk_decryption, "opens_strips", lambda: False)
