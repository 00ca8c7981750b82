"""Tensors on their way to a device: through the ring, whatever their size and number.

Where there is a GPU, all of it runs on that as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorizer import EncryptionParams, TensorSerializer

from tensorserve.bundle.keys import GivenKey
from tensorserve.errors import CorruptError
from tensorserve.format import read_index
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.loading.gpu_staging import SLOT_BYTES, GpuStaging
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources.local import LocalSource

KEY = bytes(range(32))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    ),
]


class RemoteFile(LocalSource):
    """A file that is read as if it were behind a network."""

    remote = True
    pinned = True


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """Made once, and only read."""
    generator = torch.Generator().manual_seed(7)
    sizes = [
        1,
        1000,
        DEFAULTS.part_bytes,
        SLOT_BYTES,
        SLOT_BYTES + 1,
        5 * DEFAULTS.part_bytes + 3,
        20 * DEFAULTS.part_bytes,
    ]
    made = {
        f"t{number}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for number, size in enumerate(sizes)
    }
    made["shaped"] = torch.randn(3, 5, 7, generator=generator).to(torch.bfloat16)
    made["scalar"] = torch.tensor(2.5)
    return made


Written = Callable[..., Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Gives a file of all of them, for each key and size of chunks written once."""
    folder = tmp_path_factory.mktemp("written")

    @functools.cache
    def path(*, key: bytes | None, chunk: int | None = None) -> Path:
        found = folder / f"{'plain' if key is None else key.hex()}-{chunk}.tensors"
        sealing = EncryptionParams(key=key) if key else None
        serializer = TensorSerializer(str(found), encryption=sealing)
        if chunk:
            serializer._crypt_chunk_size = chunk
        serializer.write_state_dict(tensors())
        serializer.close()
        return found

    return path


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [0, 64 * SLOT_BYTES])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("kind", [LocalSource, RemoteFile])
def test_tensors_come_whole_to_the_device(
    written: Written, kind: type[LocalSource], key: bytes | None, limit: int, device: str
) -> None:
    """With two slots and with many, from a file and as from a network."""
    source = kind(written(key=key))
    wanted = tensors()
    index = read_index(source)
    found = {}
    with TensorStream(
        source,
        index.tensors,
        encrypted=index.encrypted,
        key=GivenKey(KEY, "test") if key else None,
        options=LoadOptions(connections=7, ahead_bytes=16 * 1024**2),
        progress=LoadProgress(),
        staging=GpuStaging(torch.device(device), limit),
    ) as stream:
        for record, tensor in stream:
            assert tensor.device.type == device
            found[record.name] = tensor.cpu().clone()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("chunk", [2, 3])
def test_what_is_not_staged_stays_in_host_memory(
    written: Written, chunk: int, key: bytes | None, hashes: bool, device: str
) -> None:
    """Of a large tensor a rank takes a slice: the device never has room for all of it. What has its
    place there comes there all the same."""
    path = written(key=key, chunk=chunk * 1024**2)
    source = LocalSource(path)
    wanted = tensors()
    staging = GpuStaging(torch.device(device), 0)
    taken: list[int] = []
    memory = staging.memory

    def counted(count: int) -> torch.Tensor:
        taken.append(count)
        return memory(count)

    staging.memory = counted  # type: ignore[method-assign]
    place = torch.empty(wanted["t6"].numel(), dtype=torch.uint8, device=device)
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=key is not None,
        key=GivenKey(KEY, "test") if key else None,
        # Less than the largest of them: it is let in alone.
        options=LoadOptions(connections=3, ahead_bytes=8 * 1024**2, verify_hashes=hashes),
        progress=LoadProgress(),
        place=lambda record: place if record.name == "t6" else None,
        staging=staging,
        staged=lambda record: record.length < DEFAULTS.part_bytes,
    ) as stream:
        found = {}
        for record, tensor in stream:
            here = record.name == "t6" or record.length < DEFAULTS.part_bytes
            assert tensor.device.type == (device if here else "cpu")
            found[record.name] = tensor.cpu().clone()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(count < DEFAULTS.part_bytes for count in taken)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_that_do_not_fit_a_slot(written: Written, device: str) -> None:
    """Of 64 MiB: such a tensor is opened in host memory, and goes over as a whole."""
    source = LocalSource(written(key=KEY, chunk=64 * 1024**2))
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(connections=3),
        progress=LoadProgress(),
        staging=GpuStaging(torch.device(device), 0),
    ) as stream:
        found = {record.name: tensor.cpu().clone() for record, tensor in stream}
    wanted = tensors()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_parameters_own_memory_is_filled(written: Written, device: str) -> None:
    """`place` names memory on the device."""
    source = LocalSource(written(key=KEY))
    wanted = tensors()
    homes = {
        name: torch.zeros(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device=device)
        for name, tensor in wanted.items()
    }
    with TensorStream(
        source,
        read_index(source).tensors,
        encrypted=True,
        key=GivenKey(KEY, "test"),
        options=LoadOptions(connections=3),
        progress=LoadProgress(),
        place=lambda record: homes[record.name],
        staging=GpuStaging(torch.device(device), 0),
    ) as stream:
        for record, tensor in stream:
            assert tensor.data_ptr() == homes[record.name].data_ptr()
            assert torch.equal(tensor.cpu(), wanted[record.name])


def test_a_damaged_chunk_ends_the_load_for_all(written: Written) -> None:
    """The error comes out, and nobody waits for a slot for ever."""
    path = written(key=KEY)
    staging = GpuStaging(torch.device("cpu"), 0)
    source = LocalSource(path)
    with (
        pytest.raises(CorruptError),
        TensorStream(
            source,
            read_index(source).tensors,
            encrypted=True,
            key=GivenKey(bytes(32), "test"),
            options=LoadOptions(connections=3),
            progress=LoadProgress(),
            staging=staging,
        ) as stream,
    ):
        for _ in stream:
            pass
    with pytest.raises(RuntimeError, match="ended"):
        staging.take()
    for thread in threading.enumerate():
        if thread.name.startswith("tensorserve-load"):
            thread.join(10)
            assert not thread.is_alive()


def test_slots_for_what_comes_bit_by_bit_leave_half_of_them() -> None:
    """Who has such a slot may wait for a thread that wants one as well."""
    staging = GpuStaging(torch.device("cpu"), 4 * SLOT_BYTES)
    early = [staging.take_early() for _ in range(3)]
    assert [slot is None for slot in early] == [False, False, True]
    others = [staging.take(), staging.take()]
    assert staging.take_early() is None
    assert early[0] is not None
    staging.send(early[0], staging.memory(10))
    assert staging.take_early() is not None
    assert len({slot.data_ptr() for slot in [early[1], *others] if slot is not None}) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_slots_are_used_again_and_never_by_two(device: str) -> None:
    """Two slots, eight threads: each copy is of what its own thread has written."""
    staging = GpuStaging(torch.device(device), 0)
    rounds = 50
    targets = [staging.memory(rounds * 1000) for _ in range(8)]

    def work(number: int) -> None:
        for at in range(rounds):
            slot = staging.take()
            slot[:1000] = (number * rounds + at) % 251
            staging.send(slot, targets[number][at * 1000 : (at + 1) * 1000])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    staging.join(staging.sent())
    for number, target in enumerate(targets):
        wanted = torch.arange(rounds).repeat_interleave(1000) + number * rounds
        assert torch.equal(target.cpu().long(), wanted % 251)
