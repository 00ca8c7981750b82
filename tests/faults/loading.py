"""The one place of these tests that knows how all tensors of a URI are loaded without vLLM."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

import torch

from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.format import FileKey
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.sources import Access


@dataclass
class Load:
    """What came of a load, also of one that failed: what was handed out, and what was retried."""

    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each tensor's bytes."""
    progress: LoadProgress = field(default_factory=LoadProgress)
    seconds: float = 0.0

    @property
    def retries(self) -> dict[str, int]:
        """By reason, as in the metric tensorserve_load_retries_total."""
        return dict(self.progress.snapshot().retries)


def load(
    uri: str,
    access: Access,
    key: FileKey | None,
    into: Load | None = None,
    *,
    connections: int = 4,
    version: str | None = None,
    verify_hashes: bool = False,
) -> Load:
    """Open `uri` (a .tensors file), prove the key, and take every tensor, as vLLM does."""
    result = into or Load()
    started = time.monotonic()
    try:
        opened = open_tensors(uri, access, key, observer=result.progress, version=version)
        try:
            with TensorStream(
                opened.source,
                opened.index.tensors,
                encrypted=opened.index.encrypted,
                key=opened.key,
                options=LoadOptions(connections=connections, verify_hashes=verify_hashes),
                progress=result.progress,
            ) as stream:
                for record, tensor in stream:
                    result.digests[record.name] = digest(tensor)
        finally:
            opened.source.close()
    finally:
        result.seconds = time.monotonic() - started
    return result


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
