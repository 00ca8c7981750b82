"""How a file is loaded onto a device: by our two readers, and by tensorizer alone.

Only this file knows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_files import KEY, MIB
from tensorizer import DecryptionParams, TensorDeserializer

from tensorserve.bundle.keys import GivenKey
from tensorserve.engine.checked_load import checked_as
from tensorserve.format import FileIndex, TensorRecord, read_index
from tensorserve.launch.context import Shard
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.reference import ReferenceStream
from tensorserve.sources.local import LocalSource

RING = 64 * MIB
LOADERS = ("auto", "reference")
# Options of `ours` that change how a tensor comes to the device.
WAYS: dict[str, dict[str, Any]] = {
    "two-slots": {"ring": 0},
    "64MiB": {"ring": 64 * MIB},
    "reference": {"loader": "reference"},
}


class RemoteFile(LocalSource):
    """A file that is read as if it were behind a network."""

    remote = True


def ours(
    source: LocalSource,
    device: torch.device,
    *,
    key: bytes | None = KEY,
    connections: int | None = 4,
    ring: int = RING,
    ahead: int = 64 * MIB,
    hashes: bool = False,
    loader: str = "auto",
    place: Callable[[TensorRecord], torch.Tensor | None] = lambda _: None,
    staged: Callable[[TensorRecord], bool] = lambda _: True,
    wanted: Callable[[TensorRecord], bool] = lambda _: True,
    shard: Shard | None = None,
) -> TensorStream | ReferenceStream:
    """A context manager that gives (record, tensor), as the engine makes it for this device.

    The consumer is the thread, and its stream, that calls this. `loader`: as TENSORSERVE_LOADER;
    `ring`, `place`, `staged` are for "auto". `ahead`: bytes of tensors not yet taken.
    `wanted`: which tensors a rank loads; `shard`: what the start's checks say of the file.
    """
    index: FileIndex = read_index(source)
    given = GivenKey(key, "test") if index.encrypted and key is not None else None
    records = [record for record in index.tensors if wanted(record)]
    options = LoadOptions(connections=connections, ahead_bytes=ahead, verify_hashes=hashes)
    if shard is not None:
        options = checked_as(options, shard, index, records, source.name)
    if loader == "reference":
        return ReferenceStream(
            source,
            index,
            records,
            key=given,
            options=options,
            progress=LoadProgress(),
            device=device,
        )
    return TensorStream(
        source,
        records,
        encrypted=index.encrypted,
        key=given,
        options=options,
        progress=LoadProgress(),
        place=place,
        staged=staged,
        staging=GpuStaging(device, ring, ahead_bytes=ahead),
    )


def loaded(path: Path, device: torch.device, **options: Any) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the device, by this loader."""
    source = LocalSource(path)
    try:
        with ours(source, device, **options) as stream:
            return {record.name: tensor.to(device) for record, tensor in stream}
    finally:
        source.close()


def reference(path: Path, device: torch.device, *, sealed: bool) -> dict[str, torch.Tensor]:
    """The same by tensorizer's TensorDeserializer."""
    encryption = DecryptionParams.from_key(KEY) if sealed else None
    with TensorDeserializer(str(path), device=device, encryption=encryption) as deserializer:
        return {str(name): tensor.clone() for name, tensor in deserializer.items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, where it is."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Dtype, shape and every bit; compared where `found` is."""
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and torch.equal(bits(found), bits(wanted).to(found.device))
    )


def different(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is missing, too much or not the same."""
    return [
        name
        for name in sorted(found.keys() | wanted.keys())
        if name not in found or name not in wanted or not same(found[name], wanted[name])
    ]
