"""How is a sealed chunk opened in strips, before all of its bytes have arrived?

Each strip is hashed and decrypted while it is still in the processor's cache, in any order and by
any thread. Poly1305 is a polynomial, so the strips' hashes can be combined at the end. No plaintext
may be used before `check` has validated the tag.
"""

from __future__ import annotations

import ctypes
import threading

from tensorserve.crypto.backends import BOX_STATE_BYTES, StripHash, own_box
from tensorserve.crypto.secretbox import TagMismatchError, readable, writable

# A strip begins at a multiple of this offset in its chunk, and ends at one or at the chunk's end.
STRIP_ALIGNMENT = 64


def opens_strips() -> bool:
    """Whether the backend can open strips; libsodium opens only whole chunks."""
    return own_box() is not None


class StripOpener:
    """Opens one chunk in strips. Thread-safe. Requires `opens_strips()`."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        """`key` has 32 bytes, `nonce`, the chunk's, 24."""
        box = own_box()
        assert box is not None
        assert box.strips is not None
        self._c = box.strips
        self._state = ctypes.create_string_buffer(BOX_STATE_BYTES)
        self._c.begin(self._state, nonce, key)
        self._hashes: dict[int, tuple[int, ctypes.Array[ctypes.c_uint64]]] = {}
        self._lock = threading.Lock()

    def open(self, offset: int, sealed: memoryview, out: memoryview) -> None:
        """Decrypts the strip `sealed` at `offset` of the chunk into `out`, of the same length.

        `out` may be `sealed`. Each byte of the chunk must be opened exactly once. Releases the GIL.
        """
        assert offset % STRIP_ALIGNMENT == 0
        assert len(sealed) == len(out)
        found = StripHash()
        with readable(sealed) as source, writable(out) as target:
            self._c.open(self._state, found, target, source, offset, len(sealed))
        with self._lock:
            self._hashes[offset] = len(sealed), found

    def check(self, tag: bytes) -> None:
        """Checks that the strips together are the chunk with this `tag` (16 bytes).

        Raises TagMismatchError.
        """
        with self._lock:
            strips = sorted(self._hashes.items())
        end = 0
        for offset, (length, _) in strips:
            assert offset == end
            end += length
        hashes = (StripHash * len(strips))(*(found for _, (_, found) in strips))
        lengths = (ctypes.c_uint64 * len(strips))(*(length for _, (length, _) in strips))
        if self._c.check(self._state, hashes, lengths, len(strips), bytes(tag)):
            raise TagMismatchError("The authentication tag of a chunk does not fit.")
