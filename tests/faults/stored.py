"""What the fault tests load: a packed, encrypted bundle in a real S3 server, and what is in it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from s3server import S3Server
from safetensors.torch import save_file

from s3_clients import s3_client
from tensorserve.bundle.keys import GivenKey
from tensorserve.format import FileIndex
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy, S3Access

MIB = 1024**2
KEY = bytes(range(32))
OTHER_KEY = bytes(reversed(range(32)))
BUCKET = "models"
# Short, so that what is given up is given up within a test; a busy machine is no stall yet.
ATTEMPTS = 6
POLICY = RetryPolicy(
    attempts=ATTEMPTS,
    deadline=8.0,
    connect_timeout=3.0,
    stall_timeout=3.0,
    backoff_base=0.01,
    backoff_cap=0.05,
)
# For the stalls themselves.
IMPATIENT = replace(POLICY, stall_timeout=0.3)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Small ones that share a request, middling ones, one of many requests; 26 MiB."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    made = {f"layers.{i}.norm": noise(4096) for i in range(8)}
    made |= {f"layers.{i}.weight": noise(3 * MIB + i) for i in range(2)}
    made["embed"] = noise(15 * MIB + 17)
    made["head"] = noise(5 * MIB).view(torch.bfloat16).reshape(-1, 1024)
    return made


def plain_bundle(folder: Path) -> Path:
    """A bundle of the same tensors below `folder`, not encrypted."""
    source, bundle = folder / "hf", folder / "bundle"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(tensors(1), source / "model.safetensors", {"format": "pt"})
    pack(source, str(bundle), access=Access())
    return bundle


@dataclass(frozen=True)
class Stored:
    """One .tensors file in S3, its bytes, and the SHA-256 of each tensor that was packed."""

    name: str
    data: bytes = field(repr=False)
    digests: dict[str, str] = field(repr=False)
    index: FileIndex = field(repr=False)
    s3: S3Server = field(repr=False)

    @property
    def uri(self) -> str:
        """s3://bucket/.../model.tensors"""
        return f"s3://{BUCKET}/{self.name}"

    @property
    def key(self) -> GivenKey:
        """The right one."""
        return GivenKey(KEY, "the test")

    def client(self) -> Any:
        """Of the S3 server itself, past any proxy."""
        return s3_client(self.s3)

    def put(self, data: bytes) -> None:
        """Another object takes its name, as an upload does."""
        self.client().put_object(Bucket=BUCKET, Key=self.name, Body=data)

    def copy(self, name: str, data: bytes | None = None) -> Stored:
        """The same (or `data`) under a name of its own, to be changed."""
        made = replace(self, name=f"{name}/model.tensors", data=data or self.data)
        made.put(made.data)
        return made

    def access(self, endpoint_url: str, policy: RetryPolicy = POLICY, **s3: Any) -> Access:
        """Through `endpoint_url`, with the server's own keys."""
        keys: dict[str, Any] = {
            "access_key_id": Secret(self.s3.access_key),
            "secret_access_key": Secret(self.s3.secret_key),
        }
        made = S3Access(endpoint_url=endpoint_url, region="us-east-1", **(keys | s3))
        return Access(s3=made, policy=policy)

    def inside(self, name: str) -> int:
        """A byte in the middle of a tensor's data."""
        record = next(r for r in self.index.tensors if r.name == name)
        return record.data_offset + record.length // 2
