"""On the device stands what tensorizer reads, bit for bit, whatever the file is like."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_files import CHUNKS, MIB, Files
from gpu_loads import LOADERS, RemoteFile, different, loaded, ours, reference

from tensorserve.errors import CorruptError
from tensorserve.format import read_header, read_index
from tensorserve.launch.context import Shard
from tensorserve.sources.local import LocalSource


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("content", ["sizes", "dtypes", "many", "large", "few"])
def test_as_tensorizer_reads_it(
    files: Files, device: torch.device, content: str, chunk: str
) -> None:
    """Ours, the reference and what was written are the same."""
    path = files.path(content, chunk)
    found = loaded(path, device)
    assert {tensor.device for tensor in found.values()} == {device}
    assert list(found) == list(files.tensors(content))
    assert not different(found, reference(path, device, sealed=chunk != "plain"))
    assert not different(found, files.tensors(content))
    assert not different(loaded(path, device, loader="reference"), found)


def test_without_any_bytes(files: Files, device: torch.device) -> None:
    """Empty tensors: as tensorizer reads them, and sealed by `tensorserve pack`."""
    path = files.path("empty", "plain")
    found = loaded(path, device)
    assert not different(found, reference(path, device, sealed=False))
    assert not different(found, files.tensors("empty"))
    assert not different(loaded(files.packed("empty"), device), files.tensors("empty"))


def test_as_packed(files: Files, device: torch.device) -> None:
    """Sealed by `tensorserve pack`: tensorizer and this loader read the same."""
    path = files.packed("sizes")
    found = loaded(path, device)
    assert not different(found, reference(path, device, sealed=True))
    assert not different(found, files.tensors("sizes"))


@pytest.mark.parametrize("chunk", ["plain", "2MiB", "64MiB"])
@pytest.mark.parametrize("connections", [1, 16, None])
@pytest.mark.parametrize("ring", [0, 128 * MIB], ids=["two-slots", "128MiB"])
@pytest.mark.parametrize("kind", [LocalSource, RemoteFile])
def test_with_any_ring_and_number_of_threads(
    files: Files,
    device: torch.device,
    kind: type[LocalSource],
    ring: int,
    connections: int | None,
    chunk: str,
) -> None:
    """From a file and as from a network, whose strips are shorter."""
    source = kind(files.path("sizes", chunk))
    with ours(source, device, ring=ring, connections=connections, ahead=16 * MIB) as stream:
        found = {record.name: tensor.clone() for record, tensor in stream}
    assert not different(found, files.tensors("sizes"))


@pytest.mark.parametrize("chunk", ["plain", "2MiB", "whole"])
@pytest.mark.parametrize("content", ["sizes", "dtypes"])
def test_a_parameters_own_memory_is_filled(
    files: Files, device: torch.device, content: str, chunk: str
) -> None:
    """`place` names memory on the device; what comes is that memory."""
    homes = {
        name: torch.full(
            (tensor.numel() * tensor.element_size(),), 0xA5, dtype=torch.uint8, device=device
        )
        for name, tensor in files.tensors(content).items()
    }
    source = LocalSource(files.path(content, chunk))
    found = {}
    with ours(source, device, place=lambda record: homes[record.name]) as stream:
        for record, tensor in stream:
            assert tensor.data_ptr() == homes[record.name].data_ptr()
            found[record.name] = tensor
    assert not different(found, files.tensors(content))


@pytest.mark.parametrize("chunk", ["plain", "2MiB", "64MiB"])
def test_some_stay_in_host_memory(files: Files, device: torch.device, chunk: str) -> None:
    """As tensors do of which a rank takes a slice, between others that go on to the device."""
    source = LocalSource(files.path("sizes", chunk))
    with ours(source, device, ahead=32 * MIB, staged=lambda r: r.length % 2 == 0) as stream:
        found = {record.name: tensor.clone() for record, tensor in stream}
    wanted = files.tensors("sizes")
    for name, tensor in wanted.items():
        assert found[name].device == (device if len(tensor) % 2 == 0 else torch.device("cpu"))
    assert not different(found, wanted)


@pytest.mark.parametrize("chunk", ["plain", "2MiB", "64MiB"])
@pytest.mark.parametrize("content", ["sizes", "dtypes", "large"])
@pytest.mark.parametrize("loader", LOADERS)
def test_with_verified_hashes(
    files: Files, device: torch.device, loader: str, content: str, chunk: str
) -> None:
    """TENSORSERVE_VERIFY=hashes: each tensor comes together in host memory first."""
    source = LocalSource(files.path(content, chunk))
    with ours(source, device, hashes=True, loader=loader) as stream:
        found = {record.name: tensor.clone() for record, tensor in stream}
    assert {tensor.device for tensor in found.values()} == {device}
    assert not different(found, files.tensors(content))


def shard_of(path: Path, *, digests: bool) -> Shard:
    """As the checks hand a file over that a signed manifest authenticates."""
    source = LocalSource(path)
    index = read_index(source)
    headers = [source.read(r.header_offset, r.header_length) for r in index.tensors]
    each = [read_header(source, record, index).sha256 or b"" for record in index.tensors]
    source.close()
    return Shard(
        str(path),
        None,
        path.stat().st_size,
        headers_sha256=sha256(b"".join(headers)).hexdigest(),
        index_sha256=index.digest,
        check_digests=digests,
        digests=b"".join(each).hex() if digests else None,
    )


@pytest.mark.parametrize("digests", [False, True], ids=["", "digests"])
@pytest.mark.parametrize("chunk", ["plain", "2MiB", "64MiB"])
@pytest.mark.parametrize("loader", LOADERS)
def test_some_tensors_of_a_signed_bundle(
    files: Files, device: torch.device, loader: str, chunk: str, digests: bool
) -> None:
    """A rank loads every other one; headers of the rest count for the manifest's digest.

    Another digest of them ends the load before its last tensor, another one of a tensor with it.
    """
    path, every = files.path("sizes", chunk), files.tensors("sizes")
    chosen = dict(list(every.items())[1::2])
    shard = shard_of(path, digests=digests)
    options: dict[str, Any] = {"loader": loader, "wanted": lambda record: record.name in chosen}
    found = loaded(path, device, shard=shard, **options)
    assert {tensor.device for tensor in found.values()} == {device}
    assert not different(found, chosen)
    wrong = [replace(shard, headers_sha256="0" * 64)]
    if shard.digests is not None:
        wrong.append(replace(shard, digests="0" * len(shard.digests)))
    for other in wrong:
        with pytest.raises(CorruptError):
            loaded(path, device, shard=other, **options)
