"""What loads take of the machine they give back: memory of the device, of the host, threads."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_files import MIB, Files, Tensors
from gpu_loads import bits, different, loaded, ours, same
from gpu_work import side_stream, synchronize

from tensorserve.sources.local import LocalSource

# Allocators, and the driver, need some loads until they have what they keep.
_WARM_UP = {"cuda": 10, "cpu": 4}
_LOADS = {"cuda": 50, "cpu": 10}
# A load is some 45 MiB. On a GPU, what the driver and the allocators keep is not all known.
_SLACK = {"cuda": 64 * MIB, "cpu": 16 * MIB}
_M_MMAP_THRESHOLD = -3  # malloc.h


@pytest.fixture(autouse=True, scope="module")
def large_blocks_are_given_back() -> None:
    """By default glibc raises what it counts as large, and keeps up to 180 MiB in its heaps here:
    which of them depends on which thread was first.
    """
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024) == 1


def used(device: torch.device, others: set[threading.Thread]) -> dict[str, int]:
    """Bytes by kind; threads, by number. `others` may run on.

    A thread that has done its work may still be on its way out, with the last tensor in its hands.
    """
    for thread in set(threading.enumerate()) - others:
        thread.join(30)
    gc.collect()
    synchronize(device)
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    found = {"resident": int(resident.split()[1]) * 1024, "threads": threading.active_count()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        host = torch.cuda.host_memory_stats()
        found |= {
            "device, by torch": torch.cuda.memory_allocated(device),
            "device, by the driver": total - free,
            "page-locked": host["allocated_bytes.current"],
        }
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"hashes": True}, {"loader": "reference"}],
    ids=["auto", "hashes", "reference"],
)
@pytest.mark.parametrize("chunk", ["plain", "2MiB", "64MiB"])
def test_many_loads_take_no_more_than_the_first(
    files: Files, device: torch.device, chunk: str, options: dict[str, Any]
) -> None:
    """Of the device, by torch's count and by the driver's; page-locked; resident; threads."""
    path = files.path("sizes", chunk)
    others = set(threading.enumerate())
    before: dict[str, int] = {}
    for number in range(_LOADS[device.type]):
        if number == _WARM_UP[device.type]:
            before = used(device, others)
        found = loaded(path, device, **options)
        assert len(found) == len(files.tensors("sizes"))
        del found
    after = used(device, others)
    grown = {name: after[name] - before[name] for name in before}
    assert grown.pop("threads") == 0
    assert grown.pop("device, by torch", 0) == 0
    assert all(more < _SLACK[device.type] for more in grown.values()), grown


def test_tensors_that_are_let_go_of_leave_the_device(files: Files, device: torch.device) -> None:
    """Of a stream that copies tensor by tensor, only what is ahead is held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    path = files.path("equal_ones", "2MiB")  # made now, if no test has
    others = set(threading.enumerate())
    before = used(device, others)
    source = LocalSource(path)
    with ours(source, device, ring=0, ahead=32 * MIB) as stream:
        for _, tensor in stream:
            del tensor
    after = used(device, others)
    if device.type == "cuda":
        assert after["device, by torch"] == before["device, by torch"]
        peak = torch.cuda.max_memory_allocated(device) - before["device, by torch"]
        assert peak <= 48 * MIB
    assert after["resident"] - before["resident"] < 80 * MIB


def test_into_a_pool_of_the_consumers(gpu: torch.device, files: Files) -> None:
    """As vLLM's sleep mode loads: parameters come of a memory pool, which is unmapped as a whole.

    What only passes by must not stay in the pool.
    """
    wanted = files.tensors("equal_ones")
    pool = torch.cuda.MemPool()
    source = LocalSource(files.path("equal_ones", "2MiB"))
    with torch.cuda.use_mem_pool(pool, device=gpu):
        parameters = {name: torch.empty_like(value, device=gpu) for name, value in wanted.items()}
        mine = _bytes_of(pool)
        _copy_into(parameters, source, gpu)
        kept = _bytes_of(pool)
    assert not different(parameters, wanted)
    assert mine >= sum(value.numel() for value in wanted.values())
    assert kept - mine <= 64 * MIB, "what passed by stays in the pool of the parameters"


def test_places_in_a_pool_of_the_consumers(gpu: torch.device, files: Files) -> None:
    """The same, with parameters that are filled where they are, on a stream of the consumer's."""
    wanted = files.tensors("sizes")
    pool = torch.cuda.MemPool()
    source = LocalSource(files.path("sizes", "64MiB"))
    with side_stream(gpu), torch.cuda.use_mem_pool(pool, device=gpu):
        parameters = {name: torch.empty_like(value, device=gpu) for name, value in wanted.items()}
        with ours(source, gpu, place=lambda record: bits(parameters[record.name])) as stream:
            for record, tensor in stream:
                assert same(tensor, wanted[record.name])
    assert not different(parameters, wanted)


def _copy_into(parameters: Tensors, source: LocalSource, device: torch.device) -> None:
    with ours(source, device, ahead=32 * MIB) as stream:
        for record, tensor in stream:
            parameters[record.name].copy_(tensor)
            del tensor


def _bytes_of(pool: torch.cuda.MemPool) -> int:
    return sum(segment["total_size"] for segment in pool.snapshot())
