"""On to the device: parts go through a ring of page-locked memory, on a stream of their own.

From page-locked memory a GPU fetches by itself, several times as fast as from other memory and
beside all else. The ring is allocated once; an event says when a slot may be filled again, another
one when all of a tensor is there, and no thread waits for the device but for a free slot. Not run
on a GPU yet: on a CPU the same code runs with ordinary memory and copies, and its use of CUDA is
tested with a stand-in for torch.cuda (tests/fake_cuda.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tensorserve.linux import run_on
from tensorserve.loading.schedule import PART_BYTES

SLOT_BYTES = PART_BYTES
# 128 MiB on their way keep any bus busy: PCIe 5.0 moves them in 3 ms.
RING_BYTES = 64 * SLOT_BYTES
# Tensors that wait on the device for the consumer: no more than a part of what is free there, and
# no more than brings anything. vLLM's cache of keys and values is not made before the load.
_MOST_AHEAD = 4 * 1024**3
_AHEAD_PART = 4
# Much of torch.cuda has no types.
_CUDA: Any = torch.cuda


class Staging:
    """The way to one device. Made in the thread that consumes the tensors; thread-safe."""

    def __init__(
        self,
        device: torch.device,
        limit: int,
        *,
        ahead_bytes: int | None = None,
        processors: Collection[int] = (),
    ) -> None:
        """`limit`: bytes of host memory for the ring; two slots of 2 MiB are the least.

        `ahead_bytes`: of memory on the device for tensors that the consumer has not taken yet;
        None: a quarter of what is free there, 4 GiB at most. `processors`: near the device; the
        ring's pages are found from one of them, and so in their memory.
        """
        self._cuda = device.type == "cuda"
        self._own = threading.local()
        self._own.here = True  # the consumer's thread has its device
        self._copies: Any = None
        self._consumer: Any = None
        if self._cuda:
            # In another thread, "cuda" without a number would be the first GPU.
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self._consumer = torch.cuda.current_stream(device)
            self._copies = _CUDA.Stream(device)
            # What is filled may just be made.
            self._copies.wait_stream(self._consumer)
        self.device = device
        self.ahead_bytes = self._default_ahead() if ahead_bytes is None else ahead_bytes
        # A power of two: torch rounds page-locked memory up to one.
        fitting = max(2, min(RING_BYTES, limit) // SLOT_BYTES)
        count = 1 << (fitting.bit_length() - 1)
        self.ring_bytes = count * SLOT_BYTES
        ring = self._ring(processors)
        self._free: list[torch.Tensor] = [
            ring[n * SLOT_BYTES : (n + 1) * SLOT_BYTES] for n in range(count)
        ]
        self._flying: deque[tuple[Any, torch.Tensor]] = deque()  # (event, slot), oldest first
        self._changed = threading.Condition()
        self._early: set[int] = set()
        """Addresses of slots that `take_early` gave out."""
        self._most_early = count // 2
        self._stopped = False

    def memory(self, count: int) -> torch.Tensor:
        """`count` bytes on the device (uint8), for the consumer; only `send` may write there."""
        if not self._cuda:
            return torch.empty(count, dtype=torch.uint8, device=self.device)
        self._come_here()
        # Of the consumer's stream: the memory is used again after what the consumer does with it.
        with torch.cuda.stream(self._consumer):
            memory = torch.empty(count, dtype=torch.uint8, device=self.device)
            self._copies.wait_stream(self._consumer)
        return memory

    def take_early(self) -> torch.Tensor | None:
        """A slot for what comes bit by bit, None where there is none to spare.

        At most half of them: who has one may wait for threads that wait in `take`.
        """
        self._come_here()
        with self._changed:
            self._land()
            if not self._free or len(self._early) >= self._most_early:
                return None
            slot = self._free.pop()
            self._early.add(slot.data_ptr())
            return slot

    def take(self) -> torch.Tensor:
        """A slot: SLOT_BYTES of host memory, to be sent or given back. Raises once stopped.

        Who has one must wait for no other thread before that.
        """
        self._come_here()
        while True:
            with self._changed:
                self._land()
                if self._stopped:
                    raise RuntimeError("the load has ended")
                if self._free:
                    return self._free.pop()
                oldest = self._flying[0][0] if self._flying else None
                if oldest is None:
                    self._changed.wait()  # all are being filled
            if oldest is not None:
                oldest.synchronize()

    def send(self, slot: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the slot's first bytes to `target` (uint8, on the device); the slot is free then."""
        source = slot[: target.numel()]
        if not self._cuda:
            target.copy_(source)
            self.give_back(slot)
            return
        self._come_here()
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = self._mark()
        with self._changed:
            self._early.discard(slot.data_ptr())
            self._flying.append((event, slot))
            self._changed.notify()

    def send_all(self, memory: memoryview, target: torch.Tensor) -> None:
        """Copy `memory`, of any length and kind, to `target`; it may be used again at once."""
        for start in range(0, len(memory), SLOT_BYTES):
            part = memory[start : start + SLOT_BYTES]
            slot = self.take()
            slot.numpy().data[: len(part)] = part
            self.send(slot, target[start : start + len(part)])

    def give_back(self, slot: torch.Tensor) -> None:
        """A slot that was not sent."""
        with self._changed:
            self._early.discard(slot.data_ptr())
            self._free.append(slot)
            self._changed.notify()

    def sent(self) -> object | None:
        """For `join`: all that was sent up to now."""
        if not self._cuda:
            return None
        self._come_here()
        with torch.cuda.stream(self._copies):
            event: object = self._mark()
        return event

    def join(self, sent: object | None) -> None:
        """Whatever the calling thread asks of the device from now on comes after `sent`."""
        if sent is not None:
            _CUDA.current_stream(self.device).wait_event(sent)

    def stop(self) -> None:
        """Let nobody wait for a slot any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until nothing is written any more, and give the ring's memory back.

        Nothing can be taken then. A slot that a thread still holds goes with that thread.
        """
        self.stop()
        if not self._cuda:
            return
        self._copies.synchronize()
        with self._changed:
            self._free.clear()
            self._flying.clear()
        empty_host_cache()

    def _come_here(self) -> None:
        """Make the device this thread's own, once.

        A thread begins on the first GPU. torch.cuda.stream puts back what was before, and that,
        like any call of the runtime there, makes a context: half a GiB on another rank's GPU.
        """
        if self._cuda and not getattr(self._own, "here", False):
            torch.cuda.set_device(self.device)
            self._own.here = True

    def _default_ahead(self) -> int:
        if not self._cuda:
            return _MOST_AHEAD
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(_MOST_AHEAD, free // _AHEAD_PART)

    def _ring(self, processors: Collection[int]) -> torch.Tensor:
        """Memory of `ring_bytes`; on CUDA page-locked, and near the device."""

        def make() -> torch.Tensor:
            if processors:
                run_on(processors)
            self._come_here()
            return torch.empty(self.ring_bytes, dtype=torch.uint8, pin_memory=self._cuda)

        # In a thread of its own: the kernel gives pages of the memory beside the processor that
        # asks for them, and the consumer's thread stays where it is.
        with ThreadPoolExecutor(1, "tensorserve-ring") as pool:
            return pool.submit(make).result()

    def _land(self) -> None:
        while self._flying and self._flying[0][0].query():
            self._free.append(self._flying.popleft()[1])

    def _mark(self) -> Any:
        # Blocking: a thread that waits for it sleeps, and leaves its core to decryption.
        event = _CUDA.Event(blocking=True)
        event.record(self._copies)
        return event


def empty_host_cache() -> None:
    """Have torch let go of page-locked memory that is unused, which it would keep for ever."""
    # torch 2.13 has a public name for it; earlier ones may have only the private one.
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    (empty or torch._C._host_emptyCache)()
