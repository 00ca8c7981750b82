"""How do parts of a tensor get to a GPU? Through a ring of page-locked memory, on their own stream.

From page-locked memory a GPU copies by DMA, several times as fast as from other memory, while the
processors do something else. The ring is allocated once; a CUDA event tells when a slot may be
filled again, another one when all of a tensor has arrived. Threads wait for a free slot, and for
nothing else of the device. Not run on a GPU yet: on a CPU the same code runs with ordinary memory
and copies, and its use of CUDA is tested with a stand-in for torch.cuda (tests/fake_cuda.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tensorserve.linux import run_on
from tensorserve.loading.tuning import DEFAULTS

SLOT_BYTES = DEFAULTS.part_bytes
RING_BYTES = DEFAULTS.ring_slots * SLOT_BYTES
# Much of torch.cuda has no types.
_CUDA: Any = torch.cuda


class GpuStaging:
    """The way to one device. Made in the thread that consumes the tensors; thread-safe."""

    def __init__(
        self,
        device: torch.device,
        limit: int,
        *,
        ahead_bytes: int | None = None,
        processors: Collection[int] = (),
        ahead_part: int = 1,
    ) -> None:
        """`limit`: bytes of host memory for the ring, which has two slots at least.

        `ahead_bytes`: memory on the device for tensors that the consumer has not taken yet; None: a
        part of what is free there (`device_ahead_part`, `most_device_ahead`), of which these are
        1/`ahead_part`. `processors`: those of the device's NUMA node; one of them allocates the
        ring's pages, in that node's memory.
        """
        self._cuda = device.type == "cuda"
        self._own = threading.local()
        self._own.uses_device = True  # the consumer's thread, which makes this
        self._copies: Any = None
        self._consumer: Any = None
        if self._cuda:
            # In another thread, "cuda" without a number would be the first GPU.
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            self._consumer = torch.cuda.current_stream(device)
            self._copies = _CUDA.Stream(device)
            # The memory to fill may just have been allocated on the consumer's stream.
            self._copies.wait_stream(self._consumer)
        self.device = device
        every = self._default_ahead() if ahead_bytes is None else ahead_bytes
        self.ahead_bytes = every // ahead_part
        # A power of two: torch rounds page-locked memory up to one.
        fitting = max(DEFAULTS.least_ring_slots, min(RING_BYTES, limit) // SLOT_BYTES)
        count = 1 << (fitting.bit_length() - 1)
        self.ring_bytes = count * SLOT_BYTES
        ring = self._ring(processors)
        self._free: list[torch.Tensor] = [
            ring[n * SLOT_BYTES : (n + 1) * SLOT_BYTES] for n in range(count)
        ]
        self._copying: deque[tuple[Any, torch.Tensor]] = deque()
        """(event, slot) of copies that were started, oldest first."""
        self._changed = threading.Condition()
        self._early: set[int] = set()
        """Addresses of slots that `take_early` gave out."""
        self._most_early = count // 2
        self._stopped = False

    def memory(self, count: int) -> torch.Tensor:
        """`count` bytes on the device (uint8), for the consumer; only `send` may write there."""
        if not self._cuda:
            return torch.empty(count, dtype=torch.uint8, device=self.device)
        self._use_device()
        # On the consumer's stream, so that the memory is used again only after the consumer's work.
        with torch.cuda.stream(self._consumer):
            memory = torch.empty(count, dtype=torch.uint8, device=self.device)
            self._copies.wait_stream(self._consumer)
        return memory

    def received(self, count: int) -> torch.Tensor:
        """`count` bytes on the device (uint8), which the consumer's stream alone writes to."""
        if not self._cuda:
            return torch.empty(count, dtype=torch.uint8, device=self.device)
        with torch.cuda.stream(self._consumer):
            return torch.empty(count, dtype=torch.uint8, device=self.device)

    def take_early(self) -> torch.Tensor | None:
        """A slot for a part that arrives in several ranges; None where there is none to spare.

        At most half of them: a thread that has one may wait for threads that wait in `take`.
        """
        self._use_device()
        with self._changed:
            self._reclaim()
            if not self._free or len(self._early) >= self._most_early:
                return None
            slot = self._free.pop()
            self._early.add(slot.data_ptr())
            return slot

    def take(self) -> torch.Tensor:
        """A slot: SLOT_BYTES of host memory, to be sent or given back. Waits for one.

        Until then its thread must not wait for another one. Raises RuntimeError once stopped.
        """
        self._use_device()
        while True:
            with self._changed:
                self._reclaim()
                if self._stopped:
                    raise RuntimeError("the load has ended")
                if self._free:
                    return self._free.pop()
                oldest = self._copying[0][0] if self._copying else None
                if oldest is None:
                    self._changed.wait()  # all slots are being filled
            if oldest is not None:
                oldest.synchronize()

    def send(self, slot: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the slot's first bytes to `target` (uint8, on the device); the slot is free then."""
        source = slot[: target.numel()]
        if not self._cuda:
            target.copy_(source)
            self.give_back(slot)
            return
        self._use_device()
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = self._mark()
        with self._changed:
            self._early.discard(slot.data_ptr())
            self._copying.append((event, slot))
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
        self._use_device()
        with torch.cuda.stream(self._copies):
            event: object = self._mark()
        return event

    def join(self, sent: object | None) -> None:
        """Have the calling thread's stream wait for `sent`; the thread itself does not wait."""
        if sent is not None:
            _CUDA.current_stream(self.device).wait_event(sent)

    def stop(self) -> None:
        """End all waits for a slot."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until all copies are done, and give the ring's memory back.

        No slot can be taken afterwards. One that a thread still holds lives as long as that thread
        holds it.
        """
        self.stop()
        if not self._cuda:
            return
        self._copies.synchronize()
        with self._changed:
            self._free.clear()
            self._copying.clear()
        empty_host_cache()

    def _use_device(self) -> None:
        """Make the device the current one of this thread, once.

        A thread begins with the first GPU as its device. torch.cuda.stream sets the device back to
        it, which, like any call of the runtime, makes a context there: half a GiB on the GPU of
        another rank.
        """
        if self._cuda and not getattr(self._own, "uses_device", False):
            torch.cuda.set_device(self.device)
            self._own.uses_device = True

    def _default_ahead(self) -> int:
        if not self._cuda:
            return DEFAULTS.most_device_ahead
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(DEFAULTS.most_device_ahead, free // DEFAULTS.device_ahead_part)

    def _ring(self, processors: Collection[int]) -> torch.Tensor:
        """Memory of `ring_bytes`; on CUDA page-locked, and near the device."""

        def make() -> torch.Tensor:
            if processors:
                run_on(processors)
            self._use_device()
            return torch.empty(self.ring_bytes, dtype=torch.uint8, pin_memory=self._cuda)

        # In a thread of its own: the kernel allocates pages on the node of the processor that asks
        # for them, and the consumer's thread keeps its processors.
        with ThreadPoolExecutor(1, "tensorserve-ring") as pool:
            return pool.submit(make).result()

    def _reclaim(self) -> None:
        while self._copying and self._copying[0][0].query():
            self._free.append(self._copying.popleft()[1])

    def _mark(self) -> Any:
        # Blocking: a thread that waits for the event sleeps instead of polling.
        event = _CUDA.Event(blocking=True)
        event.record(self._copies)
        return event


def empty_host_cache() -> None:
    """Have torch free its unused page-locked memory, which it would keep for later use."""
    # torch 2.13 has a public name for it; earlier ones may have only the private one.
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    (empty or torch._C._host_emptyCache)()
