"""What is a contestant? One module each, with `prepare` (imports, untimed) and `load` (timed).

A module is only imported in the process that measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Job:
    """One load. `kind` is encrypted, plain or safetensors."""

    contestant: str
    """The module's name."""
    uri: str
    kind: str
    key_file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the process that measures."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Loaded:
    """The result of a load. `tensors` is None if bytes were only copied."""

    tensors: Tensors | None
    close: Callable[[], None] = lambda: None
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each part of the load, if it has parts (download, read)."""


def synchronize(device: str) -> None:
    """Wait until all copies to `device` are done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
