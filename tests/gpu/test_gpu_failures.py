"""A load that fails in the middle ends with its error: no hang, no wrong tensor, nothing left."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_files import KEY, MIB, Files, Tensors
from gpu_loads import WAYS, different, loaded, ours, same
from gpu_work import synchronize

from tensorserve.errors import CorruptError, SourceUnavailableError, TensorserveError
from tensorserve.format import TensorRecord, read_index
from tensorserve.loading import TensorStream
from tensorserve.loading.reference import ReferenceStream
from tensorserve.sources import Filling
from tensorserve.sources.local import LocalSource


class BreakingFile(LocalSource):
    """From `breaks_at` on it cannot be read."""

    breaks_at = 0

    def read_parts(self, offset: int, parts: Filling) -> None:
        if offset + parts.length > self.breaks_at:
            raise SourceUnavailableError("the file is gone")
        super().read_parts(offset, parts)


class NoisyFile(LocalSource):
    """A bit at each of `places` is wrong the first time that it is read, as on a bad link."""

    places: frozenset[int] = frozenset()

    def read_parts(self, offset: int, parts: Filling) -> None:
        buffers: dict[int, memoryview] = {}

        def kept(number: int) -> memoryview:
            buffers[number] = parts.memory(number)
            return buffers[number]

        def spoiled(number: int) -> bool:
            start = offset + sum(parts.lengths[:number])
            for place in sorted(self.places):
                if start <= place < start + parts.lengths[number]:
                    buffers[number][place - start] ^= 16
                    self.places -= {place}
            return parts.on_part(number)

        super().read_parts(offset, Filling(parts.lengths, kept, spoiled))


def middle(path: Path) -> TensorRecord:
    """A tensor with half of the file before it."""
    source = LocalSource(path)
    records = read_index(source).tensors
    source.close()
    return records[len(records) // 2]


def take_all(made: TensorStream | ReferenceStream, found: Tensors) -> None:
    with made as stream:
        for record, tensor in stream:
            found[record.name] = tensor.clone()


def fails(
    files: Files,
    source: LocalSource,
    device: torch.device,
    error: type[TensorserveError],
    key: bytes = KEY,
    **options: Any,
) -> None:
    """The load of "few" ends with `error`; what came before it is right."""
    wanted = files.tensors("few")
    found: Tensors = {}
    with pytest.raises(error):
        take_all(ours(source, device, key=key, ahead=16 * MIB, **options), found)
    assert len(found) < len(wanted)
    assert all(same(tensor, wanted[name]) for name, tensor in found.items())
    for thread in threading.enumerate():
        if thread.name.startswith("tensorserve-load"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def nothing_left(files: Files, device: torch.device) -> object:
    """After the test the device works, and holds no more than before it."""
    synchronize(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    yield
    gc.collect()  # an error's frames may name tensors
    synchronize(device)
    after = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    assert after == before
    assert not different(loaded(files.path("smallest", "2MiB"), device), files.tensors("smallest"))


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", ["2MiB", "3MiB", "whole"])
def test_a_flipped_bit(
    files: Files, device: torch.device, tmp_path: Path, chunk: str, way: str
) -> None:
    """At rest: reading it again does not help."""
    path = tmp_path / "damaged.tensors"
    data = bytearray(files.path("few", chunk).read_bytes())
    data[middle(files.path("few", chunk)).data_offset + 3 * MIB] ^= 1
    path.write_bytes(data)
    fails(files, LocalSource(path), device, CorruptError, **WAYS[way])


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_bit_that_only_a_hash_shows(
    files: Files, device: torch.device, tmp_path: Path, way: str
) -> None:
    """Of a plain file, with TENSORSERVE_VERIFY=hashes."""
    path = tmp_path / "damaged.tensors"
    data = bytearray(files.path("few", "plain").read_bytes())
    data[middle(files.path("few", "plain")).data_offset + 3 * MIB] ^= 1
    path.write_bytes(data)
    fails(files, LocalSource(path), device, CorruptError, hashes=True, **WAYS[way])


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", ["2MiB", "64MiB"])
def test_the_wrong_key(files: Files, device: torch.device, chunk: str, way: str) -> None:
    """The engine proves the key first; the loader must not rely on that."""
    source = LocalSource(files.path("few", chunk))
    fails(files, source, device, CorruptError, key=bytes(32), **WAYS[way])


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", ["plain", "2MiB"])
def test_a_source_that_breaks_off(files: Files, device: torch.device, chunk: str, way: str) -> None:
    """In the middle of the file."""
    path = files.path("few", chunk)
    source = BreakingFile(path)
    source.breaks_at = middle(path).data_offset
    fails(files, source, device, SourceUnavailableError, **WAYS[way])


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", ["plain", "2MiB"])
def test_a_consumer_that_gives_up(files: Files, device: torch.device, chunk: str, way: str) -> None:
    """Its own error comes out; what is on its way to the device is waited for."""
    source = LocalSource(files.path("few", chunk))

    def give_up_at_the_third() -> None:
        with ours(source, device, **WAYS[way]) as stream:
            for number, _ in enumerate(stream):
                if number == 3:
                    raise InterruptedError

    with pytest.raises(InterruptedError):
        give_up_at_the_third()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("chunk", ["2MiB", "3MiB", "64MiB"])
def test_bits_that_were_wrong_on_the_way_are_read_again(
    files: Files, device: torch.device, chunk: str
) -> None:
    """Of data and of headers; the tensors are then right."""
    path = files.path("few", chunk)
    source = NoisyFile(path)
    records = read_index(source).tensors
    source.places = frozenset(
        [record.data_offset + record.length // 2 for record in records[::4]]
        + [records[3].header_offset + records[3].header_length - 20]
    )
    with ours(source, device) as stream:
        found = {record.name: tensor.clone() for record, tensor in stream}
    assert not source.places, "no bit was spoiled: the test shows nothing"
    assert not different(found, files.tensors("few"))
