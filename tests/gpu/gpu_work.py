"""Work on a GPU that takes its time, so that what does not wait for it is seen. Nothing on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu_files import MIB

# Of a fast GPU's clock: on a slower one it takes longer, which shows as much.
_CYCLES_PER_MILLISECOND = 2_000_000
_BLOCK = 128 * MIB


def slow(device: torch.device, milliseconds: float) -> None:
    """Keep the current stream from what is asked of it next for about so long."""
    if device.type == "cuda":
        torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MILLISECOND))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Another stream than the default one, as current stream; at the end all of it is done."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def synchronize(device: torch.device) -> None:
    """All that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BusyLink:
    """The way to the GPU, occupied by copies on a stream of their own: other copies are late."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._source = torch.empty(_BLOCK, dtype=torch.uint8, pin_memory=True)
            self._target = torch.empty(_BLOCK, dtype=torch.uint8, device=device)

    def occupy(self, copies: int = 4) -> None:
        """Ask for so many copies of 128 MiB (2 to 5 ms each); does not wait for them."""
        if self._device.type == "cuda":
            with torch.cuda.stream(self._stream):
                for _ in range(copies):
                    self._target.copy_(self._source, non_blocking=True)


def poison(device: torch.device, count: int) -> None:
    """Leave `count` bytes of the current stream's free memory full of 0xA5.

    Who reads memory that nobody has written sees these.
    """
    torch.full((count,), 0xA5, dtype=torch.uint8, device=device)
