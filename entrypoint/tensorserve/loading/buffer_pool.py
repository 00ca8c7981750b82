"""Which host memory does a tensor get? That of a tensor that is gone, where there is some.

Fresh memory costs the kernel a page for every 4 KiB, which takes more processor time than
decryption (docs/measurements.md, `limits`).
"""

from __future__ import annotations

import mmap
import threading
import weakref
from queue import SimpleQueue

import torch

from tensorserve.loading.tuning import DEFAULTS


class _Lent(weakref.ref[memoryview]):
    """What torch holds of a block. weakref.finalize does more than is needed here."""

    __slots__ = ("block",)

    block: mmap.mmap


class BufferPool:
    """Memory for tensors. Thread-safe."""

    def __init__(self, keep: int) -> None:
        """`keep`: the most bytes that are held for later tensors."""
        self._keep = keep
        self._kept = 0
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()
        # Memory may return at any moment of any thread, also of one that holds the lock.
        self._returned: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._lent: dict[int, _Lent] = {}

    def take(self, count: int) -> torch.Tensor:
        """A uint8 tensor of `count` bytes. Its memory returns here when its last view is gone, so
        what a consumer keeps is not used again.
        """
        return tensor_of(self.lend(count))

    def lend(self, count: int) -> memoryview:
        """The memory of `take`, for `tensor_of`. It returns here when that object is gone."""
        if count < DEFAULTS.pooled_bytes:
            return memoryview(bytearray(count))
        block = self._fitting(count) or _fresh(count)
        # torch holds this object as long as any tensor uses the memory.
        owner = memoryview(block)[:count]
        lent = _Lent(owner, self._back)
        lent.block = block
        self._lent[id(lent)] = lent
        return owner

    def _back(self, lent: _Lent) -> None:
        del self._lent[id(lent)]
        self._returned.put(lent.block)

    def _fitting(self, count: int) -> mmap.mmap | None:
        with self._lock:
            while not self._returned.empty():
                self._free.append(self._returned.get())
                self._kept += len(self._free[-1])
            fitting = [
                block for block in self._free if count <= len(block) <= DEFAULTS.pool_slack * count
            ]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._free.remove(block)
                self._kept -= len(block)
            # The oldest goes first; it is unmapped with the last reference to it.
            while self._kept > self._keep:
                self._kept -= len(self._free.pop(0))
            return block


def tensor_of(memory: memoryview) -> torch.Tensor:
    """A uint8 tensor, which holds `memory` as long as anything uses it."""
    if not memory:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _fresh(count: int) -> mmap.mmap:
    # Private: page faults of shared memory (the default of Python's mmap) cost more.
    return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
