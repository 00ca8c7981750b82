"""The consumer's work on a tensor comes after its arrival, and before its memory is used again.

On any stream, however late device and link are.

On a GPU each of these would see wrong bytes if a stream did not wait for another one;
`test_what_does_not_wait_is_seen` shows that the delays are long enough for that.
"""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_files import MIB, Files
from gpu_loads import WAYS, bits, different, ours
from gpu_work import BusyLink, poison, side_stream, slow, synchronize

from tensorserve.sources.local import LocalSource

CHUNKS = ["plain", "2MiB"]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_not_written_while_a_slow_consumer_reads_it(
    files: Files, device: torch.device, way: str, chunk: str
) -> None:
    """It lets go of tensors before the work on them has begun; the next ones get the memory."""
    wanted = files.tensors("equal_ones")
    copies = {name: torch.zeros_like(tensor, device=device) for name, tensor in wanted.items()}
    synchronize(device)
    source = LocalSource(files.path("equal_ones", chunk))
    with side_stream(device), ours(source, device, ahead=16 * MIB, **WAYS[way]) as stream:
        for record, tensor in stream:
            slow(device, 4)
            copies[record.name].copy_(tensor)
            del tensor
    assert not different(copies, wanted)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_is_whole_when_the_consumer_reads_it(
    files: Files, device: torch.device, way: str, chunk: str
) -> None:
    """The link is busy with something else: copies are late, and slots are long in use."""
    wanted = files.tensors("equal_ones")
    copies = {name: torch.zeros_like(tensor, device=device) for name, tensor in wanted.items()}
    link = BusyLink(device)
    synchronize(device)
    source = LocalSource(files.path("equal_ones", chunk))
    with side_stream(device):
        poison(device, 256 * MIB)
        link.occupy(20)
        with ours(source, device, **WAYS[way]) as stream:
            for number, (record, tensor) in enumerate(stream):
                copies[record.name].copy_(tensor)
                if number % 4 == 0:
                    link.occupy()
    synchronize(device)
    assert not different(copies, wanted)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_what_the_consumer_wrote_before_is_overwritten(
    files: Files, device: torch.device, chunk: str
) -> None:
    """vLLM may still be filling parameters with their initial values when the load begins."""
    wanted = files.tensors("sizes")
    homes = {name: torch.empty_like(tensor, device=device) for name, tensor in wanted.items()}
    synchronize(device)
    source = LocalSource(files.path("sizes", chunk))
    with side_stream(device):
        slow(device, 200)
        for home in homes.values():
            home.fill_(0)
        with ours(source, device, place=lambda record: bits(homes[record.name])) as stream:
            for _ in stream:
                pass
    assert not different(homes, wanted)


def test_a_consumer_in_another_thread(files: Files, device: torch.device) -> None:
    """The load belongs to the thread that takes the tensors, not to the main one."""
    wanted = files.tensors("equal_ones")
    copies = {name: torch.zeros_like(tensor, device=device) for name, tensor in wanted.items()}
    synchronize(device)
    source = LocalSource(files.path("equal_ones", "2MiB"))

    def consume() -> None:
        with side_stream(device), ours(source, device, ahead=16 * MIB) as stream:
            for record, tensor in stream:
                slow(device, 2)
                copies[record.name].copy_(tensor)
                del tensor

    thread = threading.Thread(target=consume)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert not different(copies, wanted)


def test_what_does_not_wait_is_seen(gpu: torch.device) -> None:
    """The tests above can fail: the same delays, and a copy that waits for nothing."""
    memory = torch.ones(4 * MIB, dtype=torch.uint8, device=gpu)
    read = torch.zeros_like(memory)
    others = torch.full((4 * MIB,), 2, dtype=torch.uint8).pin_memory()
    copies = torch.cuda.Stream(gpu)
    synchronize(gpu)
    with side_stream(gpu):
        slow(gpu, 4)
        read.copy_(memory)
        with torch.cuda.stream(copies):
            memory.copy_(others, non_blocking=True)
        copies.synchronize()
    assert bool((read == 2).any()), "the consumer was not slow: the tests of order show nothing"

    link = BusyLink(gpu)
    memory.fill_(0xA5)
    synchronize(gpu)
    link.occupy(20)
    with torch.cuda.stream(copies):
        memory.copy_(others, non_blocking=True)
    with side_stream(gpu):
        read.copy_(memory)
    synchronize(gpu)
    assert bool((read == 0xA5).any()), "the link was not busy: the tests of order show nothing"
