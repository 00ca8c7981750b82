"""Is a file in the page cache, and how is it brought in or put out?"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_STEP = 16 * 1024**2


def warm(path: Path) -> None:
    """Read the whole file once."""
    buffer = bytearray(_STEP)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def evict(path: Path) -> None:
    """Ask the kernel to drop the file's pages (those that are written to disk: hence the sync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident_share(path: Path) -> float:
    """Share of the file's pages in the page cache, from 0 to 1 (mincore(2))."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
        found = (ctypes.c_ubyte * pages)()
        address = _address(view)
        if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found):
            raise OSError(ctypes.get_errno(), "mincore failed")
        return sum(value & 1 for value in bytes(found)) / pages


def _address(view: mmap.mmap) -> int:
    # ctypes needs a writable buffer, which a read-only mapping is not; numpy accepts it.
    import numpy

    return int(numpy.frombuffer(view, dtype=numpy.uint8).ctypes.data)
