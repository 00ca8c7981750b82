"""Pieces of a file come in any order and cut anywhere: does each tensor come out right, once?"""

from __future__ import annotations

import functools
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

from sodium_strips import use_strips, use_whole_chunks
from tensorserve.bundle.keys import GivenKey
from tensorserve.errors import CorruptError
from tensorserve.format import TensorRecord, read_index
from tensorserve.loading import LoadProgress
from tensorserve.loading.assembler import Assembler
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.pending_tensor import PendingTensor
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources.local import LocalSource

KEY = bytes(range(32))
PART_BYTES = DEFAULTS.part_bytes
STRIPS = {"strips": use_strips, "whole": use_whole_chunks, "own": lambda _: None}
# Around a chunk of 2 MiB, and the odd ones that other chunk sizes make.
SIZES = {"one": 1, "odd": 1001, "two": 2 * PART_BYTES + 77, "chunk": PART_BYTES}


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """Made once, and only read."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for name, size in SIZES.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain, sealed as tensorizer does by default, and with chunks that fit no part."""
    folder = tmp_path_factory.mktemp("files")
    for kind, chunk in {"plain": None, "sealed": None, "small": 65_536, "long": 2**26}.items():
        encryption = None if kind == "plain" else EncryptionParams(key=KEY)
        serializer = TensorSerializer(str(folder / kind), encryption=encryption)
        if chunk:
            serializer._crypt_chunk_size = chunk
        serializer.write_state_dict(tensors())
        serializer.close()
    return {kind: folder / kind for kind in ("plain", "sealed", "small", "long")}


def pieces(record: TensorRecord, chance: random.Random, most: int) -> list[tuple[bool, int, int]]:
    """(header?, start, stop), cut anywhere, but within parts; in any order."""
    found = []
    for header, length in ((True, record.header_length), (False, record.length)):
        cuts = {0, length, *range(0, length, PART_BYTES)}
        cuts |= {chance.randrange(length) for _ in range(chance.randrange(most)) if length}
        ends = sorted(cuts)
        found += [(header, a, b) for a, b in pairwise(ends)]
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("staged", [False, True], ids=["host", "staged"])
@pytest.mark.parametrize("strips", STRIPS)
@pytest.mark.parametrize("kind", ["plain", "sealed", "small", "long"])
def test_in_any_order_cut_anywhere(
    files: dict[str, Path],
    kind: str,
    strips: str,
    staged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Headers last, halves of the cipher's blocks, neighbours before each other."""
    STRIPS[strips](monkeypatch)
    wanted = tensors()
    for seed in range(6):
        chance = random.Random(seed)
        found = opened(files[kind], chance, staged=staged)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def opened(path: Path, chance: random.Random, *, staged: bool) -> dict[str, torch.Tensor]:
    source = LocalSource(path)
    index = read_index(source)
    progress = LoadProgress()
    staging = GpuStaging(torch.device("cpu"), 8 * PART_BYTES) if staged else None
    key = GivenKey(KEY, "test") if index.encrypted else None
    assembler = Assembler(
        source, key, progress, encrypted=index.encrypted, hashes=not staged, staging=staging
    )
    pending = {
        record.name: PendingTensor(
            record, memory, memoryview(b"" if staged else memory.numpy().data), 0
        )
        for record in index.tensors
        for memory in [torch.zeros(record.length, dtype=torch.uint8)]
    }
    todo = [(name, piece) for name, p in pending.items() for piece in pieces(p.record, chance, 9)]
    chance.shuffle(todo)
    complete = []
    for name, (header, start, stop) in todo:
        tensor = pending[name]
        record = tensor.record
        data = bytearray(
            source.read(
                (record.header_offset if header else record.data_offset) + start, stop - start
            )
        )
        take = assembler.take_header if header else assembler.take
        if take(tensor, start, memoryview(data)):
            complete.append(name)
        data[:] = bytes(len(data))  # the buffer belongs to the caller again
    assert sorted(complete) == sorted(pending)
    # As a thread whose piece finished no chunk, and that comes here last.
    assert not any(assembler._finished(tensor, 0) for tensor in pending.values())
    counted = progress.snapshot().decrypt
    assert counted == (sum(r.length for r in index.tensors) if index.encrypted else 0)
    assert not any(p.chunks or p.parts or p.early for p in pending.values())
    return {name: p.memory for name, p in pending.items()}


@pytest.mark.parametrize("strips", STRIPS)
def test_what_is_damaged_at_rest_is_refused_however_it_is_cut(
    files: dict[str, Path], strips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit; it is read a second time, and is still wrong."""
    STRIPS[strips](monkeypatch)
    for seed in range(6):
        chance = random.Random(seed)
        data = bytearray(files["sealed"].read_bytes())
        index = read_index(LocalSource(files["sealed"]))
        record = next(record for record in index.tensors if record.name == "two")
        data[record.data_offset + chance.randrange(record.length)] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged").write_bytes(data)
        with pytest.raises(CorruptError, match="'two'"):
            opened(tmp_path / "damaged", chance, staged=False)
