"""A sealed chunk that is opened in strips, as they come, instead of when all of it is there.

Each strip is hashed and decrypted while it is still in the processor's cache, in any order and by
any thread. Poly1305 is a polynomial: the strips' hashes are put together at the end. Until `check`
has said that the tag fits, nothing that was opened may be used.
"""

from __future__ import annotations

import ctypes
import threading

from tensorserve.format.box import BOX_STATE_BYTES, StripHash, own_box
from tensorserve.format.crypto import TagMismatchError, readable, writable

# A strip begins at a multiple of it in its chunk, and ends at one or with the chunk.
STRIP_ALIGNMENT = 64


def opens_strips() -> bool:
    """Whether this processor's cipher can; libsodium wants whole chunks."""
    return own_box() is not None


class StripOpener:
    """One chunk on its way. Thread-safe. Only where `opens_strips`."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        """`key` of 32, `nonce` of 24 bytes."""
        box = own_box()
        assert box is not None
        assert box.strips is not None
        self._c = box.strips
        self._state = ctypes.create_string_buffer(BOX_STATE_BYTES)
        self._c.begin(self._state, nonce, key)
        self._hashes: dict[int, tuple[int, ctypes.Array[ctypes.c_uint64]]] = {}
        self._lock = threading.Lock()

    def open(self, offset: int, sealed: memoryview, out: memoryview) -> None:
        """Decrypt what stands at `offset` of the chunk into `out`, of the same length.

        `out` may be `sealed`. Each byte of the chunk is to be opened once. Releases the GIL.
        """
        assert offset % STRIP_ALIGNMENT == 0
        assert len(sealed) == len(out)
        found = StripHash()
        with readable(sealed) as source, writable(out) as target:
            self._c.open(self._state, found, target, source, offset, len(sealed))
        with self._lock:
            self._hashes[offset] = len(sealed), found

    def check(self, tag: bytes) -> None:
        """The strips are the chunk that `tag` was made for, all of it; else TagMismatchError."""
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
