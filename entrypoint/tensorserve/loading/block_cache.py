"""Which blocks of a file are in memory that the processes of a start share, and which are needed?

The blocks are the file's own bytes: of an encrypted model nothing in plain text.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct

from tensorserve.linux import FALLOC_PUNCH_HOLE, fallocate
from tensorserve.sources import Source

BLOCK_BYTES = 8 * 1024**2
MAX_RANKS = 64
ABSENT, REQUESTED, PRESENT = range(3)
# Magic, file's size, digest of what pins its version, ranks.
_FIXED = struct.Struct("<8sQ32sI")
_MAGIC = b"tsfetch1"
_STOP = 64  # one byte: request no more blocks
_AVERAGE = 72  # f64: moving average of the seconds that a block takes; 0: none has come yet
_POSITIONS = 128  # u64 for each rank: the first offset that it still needs
_STATES = _POSITIONS + 8 * MAX_RANKS


class BlockCache:
    """Shared memory: a header of whole pages, then the file's bytes, each at its own offset."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: a memfd made by `create`. Raises ValueError if it is none."""
        self._fd = descriptor
        self._head = mmap.mmap(descriptor, mmap.PAGESIZE)
        magic, self.size, self._version, self.ranks = _FIXED.unpack_from(self._head)
        if magic != _MAGIC:
            raise ValueError("not a cache of blocks")
        self.blocks = -(-self.size // BLOCK_BYTES)
        self._base = _header_bytes(self.blocks)
        if self._base > mmap.PAGESIZE:
            self._head = mmap.mmap(descriptor, self._base)

    @classmethod
    def create(cls, size: int, version: str | None, ranks: int) -> BlockCache:
        """Memory for a file of `size` bytes and `version`; no page of it is used yet."""
        descriptor = os.memfd_create("tensorserve-prefetch", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _header_bytes(-(-size // BLOCK_BYTES)) + size)
        head = _FIXED.pack(_MAGIC, size, _digest(version), ranks)
        os.pwrite(descriptor, head, 0)
        return cls(descriptor)

    @property
    def path(self) -> str:
        """The path by which other processes open it, as long as this process lives."""
        os.set_inheritable(self._fd, True)
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def fits(self, source: Source) -> bool:
        """Whether this is the memory for the file of `source`, in the same version."""
        return bool(self.size == source.size and self._version == _digest(source.version))

    def state(self, block: int) -> int:
        return self._head[_STATES + block]

    def set_state(self, block: int, state: int) -> None:
        self._head[_STATES + block] = state

    def position(self, rank: int) -> int:
        return int(struct.unpack_from("<Q", self._head, _POSITIONS + 8 * rank)[0])

    def advance(self, rank: int, offset: int) -> None:
        """`rank` needs nothing before `offset` any more."""
        struct.pack_into("<Q", self._head, _POSITIONS + 8 * rank, offset)

    @property
    def all_passed(self) -> bool:
        """Whether no rank needs any block any more."""
        return all(self.position(rank) >= self.size for rank in range(self.ranks))

    @property
    def average_seconds(self) -> float:
        """Moving average of the time that a block takes, in seconds; 0 where none has come."""
        return float(struct.unpack_from("<d", self._head, _AVERAGE)[0])

    def set_average_seconds(self, seconds: float) -> None:
        struct.pack_into("<d", self._head, _AVERAGE, seconds)

    def stop(self) -> None:
        """Have the prefetch process request no more blocks."""
        self._head[_STOP] = 1

    @property
    def stopped(self) -> bool:
        return bool(self._head[_STOP])

    def reopen(self) -> BlockCache:
        """The same memory through a new file description: flock belongs to one."""
        return BlockCache(os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC))

    def hold(self) -> None:
        """Called by the prefetch process: `held` is true for the others as long as it lives."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def release(self) -> None:
        """The prefetch process ends."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    @property
    def held(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def block(self, number: int) -> memoryview:
        """A block's memory, to be written by the prefetch process."""
        start = self._base + number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        # mmap needs an offset at a page boundary: blocks and header are multiples of a page.
        return memoryview(mmap.mmap(self._fd, length, offset=start))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy bytes of blocks whose state is PRESENT."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], self._base + offset + done)
            if not count:
                raise OSError("the shared memory was truncated")
            done += count

    def free(self, number: int) -> None:
        """Give a block's memory back to the kernel."""
        self.set_state(number, ABSENT)
        start = self._base + number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)
        fallocate(self._fd, FALLOC_PUNCH_HOLE, start, length)

    def free_all(self) -> None:
        """Give all memory back to the kernel."""
        for number in range(self.blocks):
            if self.state(number) != ABSENT:
                self.free(number)


def _header_bytes(blocks: int) -> int:
    return -(-(_STATES + blocks) // mmap.PAGESIZE) * mmap.PAGESIZE


def _digest(version: str | None) -> bytes:
    return hashlib.sha256((version or "").encode()).digest()
