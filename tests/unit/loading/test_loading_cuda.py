"""What the loader asks of CUDA, on stand-ins for two GPUs; the rank of these tests has the second.

What only a GPU can show is named in docs/loader.md.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

import fake_cuda
from fake_cuda import GIB, FakeCuda
from tensorserve import linux
from tensorserve.bundle.keys import GivenKey
from tensorserve.format import read_index
from tensorserve.loading import (
    LoadOptions,
    LoadProgress,
    TensorStream,
    chunk_decryption,
    gpu_staging,
    part_buffers,
)
from tensorserve.loading import stream as streams
from tensorserve.loading.gpu_staging import SLOT_BYTES, GpuStaging
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources.local import LocalSource
from waiting import wait_for

MIB = 1024**2
KEY = bytes(range(32))
GPU = torch.device("cuda", 1)
# Of one size mostly: freed memory of that size is what the next tensor gets.
SIZES = [2 * DEFAULTS.part_bytes + 3] * 6 + [1000] * 4 + [DEFAULTS.part_bytes] * 2
# Which streams work ahead, and which as late as they may.
ORDERS: dict[str, dict[str, Any]] = {
    "all late": {"eager": ()},
    "copies first": {"eager": ("copies", "default 1")},
    "consumer first": {"eager": ("consumer",)},
    "all at once": {"eager": ("copies", "consumer", "default 1")},
    "by chance": {"seed": 1},
    "by another chance": {"seed": 2},
}


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """Made once, and only read."""
    generator = torch.Generator().manual_seed(11)
    return {
        f"t{number:02}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(SIZES)
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain, sealed as tensorizer does by default, and with chunks that fit no part."""
    folder = tmp_path_factory.mktemp("files")
    for kind, chunk in {"plain": None, "sealed": None, "long": 64 * MIB}.items():
        encryption = None if kind == "plain" else EncryptionParams(key=KEY)
        serializer = TensorSerializer(str(folder / kind), encryption=encryption)
        if chunk:
            serializer._crypt_chunk_size = chunk
        serializer.write_state_dict(tensors())
        serializer.close()
    return {kind: folder / kind for kind in ("plain", "sealed", "long")}


def consumer_on(cuda: FakeCuda) -> None:
    """The consumer works on a stream of its own, not on the device's default one."""
    cuda.set_stream(cuda.new_consumer())


def stream_of(
    path: Path, staging: GpuStaging, *, hashes: bool = False, **options: Any
) -> TensorStream:
    source = LocalSource(path)
    index = read_index(source)
    place = options.pop("place", lambda _: None)
    return TensorStream(
        source,
        index.tensors,
        encrypted=index.encrypted,
        key=GivenKey(KEY, "test") if index.encrypted else None,
        options=LoadOptions(verify_hashes=hashes, **{"connections": 4, **options}),
        progress=LoadProgress(),
        place=place,
        staging=staging,
    )


@pytest.mark.parametrize("hashes", [False, True], ids=["", "hashes"])
@pytest.mark.parametrize("kind", ["plain", "sealed", "long"])
@pytest.mark.parametrize("order", ORDERS)
def test_whatever_runs_first_on_the_device_tensors_are_whole(
    files: dict[str, Path], order: str, kind: str, hashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are filled again, and memory is used again, only after what was asked of them.

    The consumer asks for a copy of each tensor, drops it, and looks at all of them at the end.
    """
    cuda = fake_cuda.install(monkeypatch, **ORDERS[order])
    consumer_on(cuda)
    # Two slots, and room for one tensor: all is used again, again and again.
    staging = GpuStaging(GPU, 0)
    staging.ahead_bytes = 5 * MIB
    found = {}
    with stream_of(files[kind], staging, hashes=hashes, ahead_bytes=10 * MIB) as stream:
        for record, tensor in stream:
            assert tensor.device == GPU
            kept = torch.empty(tensor.numel(), dtype=torch.uint8, device=GPU)
            found[record.name] = kept.copy_(tensor, non_blocking=True)
            del tensor
    wanted = tensors()
    assert list(found) == list(wanted)
    for name, kept in found.items():
        assert torch.equal(kept.cpu(), wanted[name]), name


def test_what_is_assembled_does_not_overwrite_what_is_unread(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that fit no part; each tensor gets the memory of the one that was just dropped."""
    cuda = fake_cuda.install(monkeypatch)
    consumer_on(cuda)
    staging = GpuStaging(GPU, 0)
    staging.ahead_bytes = 5 * MIB
    kept = []
    with stream_of(files["long"], staging, connections=1, ahead_bytes=10 * MIB) as stream:
        for _, tensor in stream:
            # Of another size: it takes nobody's memory.
            kept.append(torch.empty(tensor.numel() + 1, dtype=torch.uint8, device=GPU))
            kept[-1][:-1].copy_(tensor, non_blocking=True)
            del tensor
    for copy, wanted in zip(kept, tensors().values(), strict=True):
        assert torch.equal(copy[:-1].cpu(), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_parameters_are_filled_after_they_were_made(
    files: dict[str, Path], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own memory: what was asked of it before the load comes before the load."""
    cuda = fake_cuda.install(monkeypatch, **ORDERS[order])
    consumer_on(cuda)
    wanted = tensors()
    homes = {}
    for name, tensor in wanted.items():
        homes[name] = torch.empty(tensor.numel(), dtype=torch.uint8, device=GPU)
        homes[name].copy_(torch.zeros(tensor.numel(), dtype=torch.uint8), non_blocking=True)
    staging = GpuStaging(GPU, 0)
    place: Callable[[Any], torch.Tensor] = lambda record: homes[record.name]  # noqa: E731
    with stream_of(files["sealed"], staging, place=place) as stream:
        for record, tensor in stream:
            assert torch.equal(tensor.cpu(), wanted[record.name])


@pytest.mark.parametrize("kind", ["plain", "sealed", "long"])
def test_no_context_is_made_on_another_ranks_gpu(
    files: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads begin on the first GPU; half a GiB of it for each rank would be lost."""
    cuda = fake_cuda.install(monkeypatch)
    consumer_on(cuda)
    with stream_of(files[kind], GpuStaging(torch.device("cuda"), 0)) as stream:
        assert len(list(stream)) == len(SIZES)
    assert {name for name, _ in cuda.copies if name.startswith("tensorserve-load")}
    assert cuda.contexts == {1}


def test_a_load_that_fails_makes_none_either(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving in the middle, with copies on their way."""
    cuda = fake_cuda.install(monkeypatch)
    with stream_of(files["sealed"], GpuStaging(GPU, 0)) as stream:
        next(iter(stream))
    assert cuda.contexts == {1}


def test_tensors_wait_on_the_device_whatever_the_host_has_left(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight ranks may have 80 MiB of host memory; its large tensors still overlap."""
    cuda = fake_cuda.install(monkeypatch)
    staging = GpuStaging(GPU, 0)
    staging.ahead_bytes = 4 * SIZES[0]
    with stream_of(files["sealed"], staging, ahead_bytes=MIB) as stream:
        wait_for(lambda: cuda.allocated == staging.ahead_bytes)
        assert len(list(stream)) == len(SIZES)


def test_no_more_waits_on_the_device_than_it_may(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the one that the consumer holds itself."""
    cuda = fake_cuda.install(monkeypatch)
    staging = GpuStaging(GPU, 0)
    staging.ahead_bytes = 2 * SIZES[0] + 5000
    with stream_of(files["sealed"], staging) as stream:
        for _ in stream:
            pass
    assert SIZES[0] < cuda.most_allocated <= staging.ahead_bytes + SIZES[0]


@pytest.mark.parametrize(("free", "expected"), [(100 * GIB, 4 * GIB), (6 * GIB, 3 * GIB // 2)])
def test_how_much_may_wait_on_the_device(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of what is free, no more than 4 GiB."""
    fake_cuda.install(monkeypatch, free=free)
    assert GpuStaging(GPU, 0).ahead_bytes == expected


@pytest.mark.parametrize("slots", [2, 3, 5, 40, 63, 64, 100])
def test_page_locked_memory_is_what_was_asked_for_and_goes_back(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch rounds it up to a power of two, and keeps it until it is told otherwise."""
    cuda = fake_cuda.install(monkeypatch)
    staging = GpuStaging(GPU, slots * SLOT_BYTES)
    limit = min(slots, 64) * SLOT_BYTES
    assert limit / 2 < sum(cuda.locked.values()) == staging.ring_bytes <= limit
    target = staging.memory(1000)
    staging.send(staging.take(), target)
    staging.close()
    assert not cuda.locked


@pytest.mark.parametrize("hashes", [False, True], ids=["", "hashes"])
def test_a_load_locks_no_pages_but_the_rings(
    files: dict[str, Path], hashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a load that verifies hashes, which has whole tensors in host memory."""
    cuda = fake_cuda.install(monkeypatch)
    staging = GpuStaging(GPU, 8 * SLOT_BYTES)
    with stream_of(files["sealed"], staging, hashes=hashes) as stream:
        assert len(list(stream)) == len(SIZES)
        assert list(cuda.locked.values()) == [8 * SLOT_BYTES]
    assert not cuda.locked


@pytest.mark.parametrize("kind", ["plain", "sealed", "long"])
def test_page_locked_pages_are_not_asked_for_a_second_time(
    files: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses a driver's mappings with what an old one says to any call."""
    cuda = fake_cuda.install(monkeypatch)
    asked = []

    def populate(memory: memoryview) -> None:
        asked.append(cuda.is_page_locked(torch.frombuffer(memory, dtype=torch.uint8)))

    monkeypatch.setattr(part_buffers, "populate", populate)
    staging = GpuStaging(GPU, 64 * SLOT_BYTES)
    with stream_of(files[kind], staging) as stream:
        assert len(list(stream)) == len(SIZES)
    assert not any(asked)


def test_a_refused_mapping_switches_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whether the kernel knows the call decides, not what one memory says to it."""

    class Libc:
        calls = 0

        def madvise(self, _start: int, _count: int, _advice: int) -> int:
            self.calls += 1
            linux.ctypes.set_errno(22 if self.calls == 2 else 0)
            return -1 if self.calls == 2 else 0

    libc = Libc()
    monkeypatch.setattr(linux, "_libc", lambda: libc)
    linux._populates.cache_clear()
    try:
        for _ in range(2):
            linux.populate(memoryview(bytearray(MIB)))
    finally:
        linux._populates.cache_clear()
    assert libc.calls == 3


def test_whole_parts_are_opened_where_they_are_sent_from(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two slots of which one is for what comes bit by bit: none of it goes another way."""
    fake_cuda.install(monkeypatch)
    opened = []
    real = chunk_decryption.open_tensor_chunk

    def spy(*arguments: Any) -> None:
        # Where the processor cannot open strips, what came bit by bit is opened in its own place.
        if arguments[-2] is not arguments[-1]:
            opened.append(torch.frombuffer(arguments[-1], dtype=torch.uint8).data_ptr())
        real(*arguments)

    monkeypatch.setattr(chunk_decryption, "open_tensor_chunk", spy)
    staging = GpuStaging(GPU, 0)
    slots = {slot.data_ptr() for slot in staging._free}
    with stream_of(files["sealed"], staging) as stream:
        assert len(list(stream)) == len(SIZES)
    assert opened
    assert set(opened) <= slots


def test_the_ring_is_made_near_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread that is bound to those processors; the consumer's stays where it is."""
    fake_cuda.install(monkeypatch)
    bound: dict[str, Any] = {}
    monkeypatch.setattr(
        gpu_staging, "run_on", lambda processors: bound.update({_thread(): processors})
    )
    before = os.sched_getaffinity(0)
    GpuStaging(GPU, 0, processors=frozenset({3}))
    assert list(bound.values()) == [{3}]
    assert _thread() not in bound
    assert os.sched_getaffinity(0) == before


def _thread() -> str:
    return threading.current_thread().name


@pytest.mark.parametrize("why", ["staged", "not staged", "placed", "hashes", "long chunks"])
def test_connections_leave_the_room_of_tensors_in_host_memory(
    files: dict[str, Path], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three eighths for them, half for tensors, an eighth for memory to be used again.

    Where no tensor is in host memory, connections have the tensors' part too.
    """
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(streams, "DEFAULTS", replace(DEFAULTS, most_connections=1000))
    source = LocalSource(files["long" if why == "long chunks" else "sealed"])
    source.remote = True
    limit = 320 * MIB
    stays = why in {"not staged", "placed"}
    stream = TensorStream(
        source,
        read_index(source).tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(verify_hashes=why == "hashes", ahead_bytes=limit),
        progress=LoadProgress(),
        staging=GpuStaging(GPU, 0),
        staged=lambda _: not stays,
        place=lambda r: torch.empty(r.length, device=GPU) if why == "placed" else None,
    )
    if why == "long chunks":
        with stream:
            for _ in stream:
                pass
    took = stream._concurrency._most * stream._memory.connection_bytes
    if why in {"staged", "placed"}:
        assert took > limit * 3 // 8
    else:
        assert took <= limit * 3 // 8
