"""What do the checks before a start find out?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tensorserve.bundle.manifest import Manifest
from tensorserve.bundle.trust import MODES
from tensorserve.config.settings import Settings
from tensorserve.format import FileIndex
from tensorserve.launch.context import PackedDraft, Shard
from tensorserve.launch.gpus import Gpus
from tensorserve.telemetry import Check


@dataclass(frozen=True)
class Passed:
    """One check that holds: its name and what was found."""

    name: Check
    found: str


Report = Callable[[Passed], None]
"""Called with each check that has passed."""


def unreported(_: Passed) -> None:
    """A Report for callers that want the result alone."""


@dataclass(frozen=True)
class Weights:
    """What the checks of the source found out."""

    shards: tuple[Shard, ...] = ()
    data_bytes: int = 0
    largest_bytes: int = 0
    """Of the largest tensor."""
    sliced: bool = True
    """Whether vLLM's weight loaders take slices of tensors, where there are several ranks: not in
    its own layout, where each tensor is a parameter."""
    draft_bytes: int = 0
    """Of a draft model with files of its own, or packed with the bundle."""
    draft: PackedDraft | None = None
    manifest: Manifest | None = None
    index: FileIndex | None = None
    """Of the first file."""
    warning: str | None = None
    """To be printed: which protection is weaker than it could be."""

    @property
    def verification(self) -> str:
        """How the weights are authenticated, one of bundle.trust.MODES: for the least of its
        files.
        """
        shards = self.shards if self.draft is None else (*self.shards, self.draft.shard)
        return max((shard.verification for shard in shards), key=MODES.index)


@dataclass(frozen=True)
class Checked:
    """What all checks found out."""

    settings: Settings
    """Those that were checked, with the key if it was given by reference."""
    weights: Weights = field(default_factory=Weights)
    gpus: Gpus | None = None
    """Those that the engine will see; None on the CPU build, or without NVML."""
    host_memory_limit: int | None = None
    """Bytes that the load may take, of all ranks on this machine."""
