"""Two versions of one model, sealed with the same key, of the same size and names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import read_manifest
from tensorserve.bundle.tensors_file import OpenTensors, open_tensors
from tensorserve.format import FileIndex, FileKey, TensorRecord, read_index
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.loading.reference import ReferenceStream
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy
from tensorserve.sources.local import LocalSource

MIB = 1024**2
READERS = ("auto", "reference")
"""Values of TENSORSERVE_LOADER."""
KEY = bytes(range(32))
ACCESS = Access(policy=RetryPolicy(attempts=3, deadline=8.0, stall_timeout=3.0, backoff_base=0.01))


@dataclass(frozen=True)
class Version:
    """One bundle's file of weights."""

    data: bytes = field(repr=False)
    index: FileIndex = field(repr=False)
    digests: dict[str, str]
    """SHA-256 of each tensor's bytes."""
    headers_sha256: str
    """That its manifest authenticates."""

    def record(self, name: str) -> TensorRecord:
        """Where the tensor stands in the file."""
        return next(record for record in self.index.tensors if record.name == name)


def make_version(folder: Path, seed: int, *, encrypted: bool = True) -> Version:
    """24 tensors; `t05` is of three chunks."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    sizes = [5 * MIB if number == 5 else 96 * 1024 for number in range(24)]
    tensors = {f"t{number:02d}": noise(size) for number, size in enumerate(sizes)}
    source, bundle = folder / f"hf-{seed}", folder / f"bundle-{seed}"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    pack(source, str(bundle), access=ACCESS, key=Secret(KEY.hex()) if encrypted else None)
    path = bundle / "model.tensors"
    opened = LocalSource(path)
    manifest = read_manifest(str(bundle), ACCESS, None)
    assert manifest is not None
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}
    vouched = manifest.tensors_files["model.tensors"].headers_sha256
    version = Version(path.read_bytes(), read_index(opened), digests, vouched)
    opened.close()
    return version


def file_key() -> FileKey:
    """Of both versions."""
    return GivenKey(KEY, "the test")


def reading(opened: OpenTensors, options: LoadOptions, reader: str) -> Any:
    """The stream of all tensors, by our loader (`auto`) or by tensorizer's reader (`reference`)."""
    given: dict[str, Any] = {"key": opened.key, "options": options, "progress": LoadProgress()}
    tensors = opened.index.tensors
    if reader == "reference":
        return ReferenceStream(opened.source, opened.index, tensors, **given)
    return TensorStream(opened.source, tensors, encrypted=opened.index.encrypted, **given)


def load(
    uri: str,
    taken: dict[str, str],
    *,
    key: FileKey | None,
    headers_sha256: str | None = None,
    verify_hashes: bool = False,
    connections: int = 2,
    reader: str = "auto",
) -> None:
    """Load all tensors of `uri`; `taken` is {name: SHA-256} of those that were handed out."""
    opened = open_tensors(uri, ACCESS, key)
    options = LoadOptions(
        connections=connections, headers_sha256=headers_sha256, verify_hashes=verify_hashes
    )
    try:
        with reading(opened, options, reader) as stream:
            for record, tensor in stream:
                taken[record.name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    finally:
        opened.source.close()
