"""What is known of one tensor between its admission and the moment when it is complete?"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from tensorserve.format import StripOpener, TensorHeader, TensorRecord
from tensorserve.loading.span_table import TensorMemory


@dataclass(eq=False)
class PartialChunk:
    """A sealed chunk of which some bytes have arrived."""

    bytes_left: int
    strips: StripOpener | None
    """None where the cipher needs the whole chunk."""
    sealed: list[tuple[int, int]] = field(default_factory=list)
    """Ranges (start, stop) of the chunk that stand in the tensor's memory, still encrypted."""


@dataclass(eq=False)
class Part:
    """Host memory for `part_bytes` of a tensor that is copied to a device part by part."""

    memory: memoryview
    slot: torch.Tensor | None
    """The slot of the ring that `memory` is; None for ordinary memory, copied into a slot later."""
    bytes_left: int


class Latch:
    """Set once, and waited for by one thread: a threading.Event takes ten times as long to make."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Ends the wait. Must not be called twice."""
        self._lock.release()

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return not self._lock.locked()

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, no longer than `seconds`; whether it is."""
        if self._lock.acquire(timeout=seconds):
            self._lock.release()
            return True
        return False


NO_MEMORY = memoryview(b"")


@dataclass(eq=False, slots=True)
class PendingTensor:
    """One tensor that is being received. `lock` guards the fields that several threads change."""

    record: TensorRecord
    memory: torch.Tensor | None = None
    """uint8, of the record's length; on the device where the tensor is copied there. None: it is
    made of `view` when it is handed out.
    """
    view: memoryview = NO_MEMORY
    """Host memory of the whole tensor; empty where it is copied to a device part by part."""
    ahead_bytes: int = 0
    """What it takes of the budget for tensors ahead of the consumer."""
    gathered_bytes: int = 0
    """Host memory that is taken until it is copied to the device as a whole."""
    staged: bool = True
    """Whether it is copied to the device, where there is a `GpuStaging`."""
    header_only: bool = False
    """Whether only its header is read, for the digest of all headers."""
    header: TensorHeader | None = None
    header_bytes: bytearray = field(default_factory=bytearray)
    header_bytes_left: int = field(init=False)
    early: list[tuple[int, int]] = field(default_factory=list)
    """Ranges (start, stop) that arrived before the header; they stand in their place."""
    chunks: dict[int, PartialChunk] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)
    bytes_left: int = field(init=False)
    """Bytes that are not yet plain text in their place, and 1 for the header."""
    second_header: TensorHeader | None = None
    """The header, where a second read gave another one: chunks whose sealing differs are read again
    when all else has arrived."""
    failed_chunks: set[int] = field(default_factory=set)
    """Chunks that did not authenticate under the first header, where there is a second one."""
    done: Latch = field(default_factory=Latch)
    lock: threading.RLock = field(default_factory=threading.RLock)
    copied: object | None = None
    """What the consumer's stream waits for on the device (`GpuStaging.join`)."""

    in_c: TensorMemory | None = None
    """The memory for C, where C puts the tensor together and counts its bytes."""
    sealed: TensorMemory | None = None
    """Since its header came: what opens its chunks in C; None where Python opens them."""

    def __post_init__(self) -> None:
        self.bytes_left = 1 if self.header_only else self.record.length + 1
        self.header_bytes_left = self.record.header_length

    def hand_over(self) -> None:
        """Drop the memory, which is the consumer's now: a job that goes on may still hold this."""
        self.memory, self.view = None, NO_MEMORY
        if self.in_c is not None:
            self.in_c.let_go()
        self.in_c = self.sealed = None
