"""On to the device: parts go through a ring of page-locked memory, on a stream of their own.

From page-locked memory a GPU fetches by itself, several times as fast as from other memory and
beside all else. The ring is allocated once; an event says when a slot may be filled again, another
one when all of a tensor is there, and no thread waits for the device but for a free slot. Not run
on a GPU yet: on a CPU the same code runs with ordinary memory and copies, which the tests do.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from tensorserve.loading.schedule import PART_BYTES

SLOT_BYTES = PART_BYTES
# 128 MiB on their way keep any bus busy: PCIe 5.0 moves them in 3 ms.
_MOST_SLOTS = 64
# Much of torch.cuda has no types.
_CUDA: Any = torch.cuda


class Staging:
    """The way to one device. Made in the thread that consumes the tensors; thread-safe."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: bytes of host memory for the ring; two slots of 2 MiB are the least."""
        self._cuda = device.type == "cuda"
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
        count = max(2, min(_MOST_SLOTS, limit // SLOT_BYTES))
        ring = torch.empty(count * SLOT_BYTES, dtype=torch.uint8, pin_memory=self._cuda)
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
        # Of the consumer's stream: the memory is used again after what the consumer does with it.
        with torch.cuda.stream(self._consumer):
            memory = torch.empty(count, dtype=torch.uint8, device=self.device)
            self._copies.wait_stream(self._consumer)
        return memory

    def take_early(self) -> torch.Tensor | None:
        """A slot for what comes bit by bit, None where there is none to spare.

        At most half of them: who has one may wait for threads that wait in `take`.
        """
        with self._changed:
            self._land()
            if not self._free or len(self._early) >= self._most_early:
                return None
            slot = self._free.pop()
            self._early.add(slot.data_ptr())
            return slot

    def take(self) -> torch.Tensor:
        """A slot: SLOT_BYTES of host memory, to be sent or given back. Raises once stopped."""
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
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = self._mark()
        with self._changed:
            self._early.discard(slot.data_ptr())
            self._flying.append((event, slot))
            self._changed.notify()

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
        """Wait until nothing is written any more; for a load that ended early."""
        if self._cuda:
            self._copies.synchronize()

    def _land(self) -> None:
        while self._flying and self._flying[0][0].query():
            self._free.append(self._flying.popleft()[1])

    def _mark(self) -> Any:
        # Blocking: a thread that waits for it sleeps, and leaves its core to decryption.
        event = _CUDA.Event(blocking=True)
        event.record(self._copies)
        return event
