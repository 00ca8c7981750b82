"""Host memory for tensors on their way: handed out, and used again once nobody holds it.

Fresh memory costs a page fault for every 4 KiB, on these sizes a third of the time that
decrypting takes. So what a tensor has given back is kept for the next one.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from queue import SimpleQueue

import torch

# Smaller pieces are malloc's business.
_LEAST = 256 * 1024


class HostMemory:
    """Memory for tensors; at most `keep` bytes are held for later use. Thread-safe."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept = 0
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()
        # Memory may come back at any moment of any thread, also of one that holds the lock.
        self._returned: SimpleQueue[mmap.mmap] = SimpleQueue()

    def take(self, count: int) -> torch.Tensor:
        """A uint8 tensor of `count` bytes. Its memory returns here when the last view is gone.

        That a consumer holds on to a tensor is no danger: its memory is then not used again.
        """
        if count < _LEAST:
            return torch.empty(count, dtype=torch.uint8)
        block = self._fitting(count) or _fresh(count)
        # torch holds this object as long as any tensor uses the memory.
        owner = (ctypes.c_ubyte * count).from_buffer(block)
        weakref.finalize(owner, self._returned.put, block)
        return torch.frombuffer(owner, dtype=torch.uint8, count=count)

    def _fitting(self, count: int) -> mmap.mmap | None:
        with self._lock:
            while not self._returned.empty():
                self._free.append(self._returned.get())
                self._kept += len(self._free[-1])
            fitting = [block for block in self._free if count <= len(block) <= 2 * count]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._free.remove(block)
                self._kept -= len(block)
            # The oldest goes first; it is unmapped with the last reference to it.
            while self._kept > self._keep:
                self._kept -= len(self._free.pop(0))
            return block


def _fresh(count: int) -> mmap.mmap:
    # Private: shared memory (mmap's default here) has dearer page faults.
    return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
