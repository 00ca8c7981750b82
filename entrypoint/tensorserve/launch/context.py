"""What do the processes of one start share? Settings, plan, and which files were checked.

It is parsed once, and handed from parent to child in memory (`tensorserve.launch.handoff`), secrets
included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensorserve.bundle.trust import DIGESTS
from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.launch import handoff
from tensorserve.launch.codec import decode, encode


@dataclass(frozen=True)
class Shard:
    """One file of weights, as the checks found it."""

    uri: str
    version: str | None
    """Version of the object (ETag, modification time); the loader refuses another one."""
    size: int
    headers_sha256: str | None = None
    """Of all tensors' headers, where there is a manifest."""
    fingerprint: Mapping[str, Any] | None = None
    """Of the engine whose parameters it holds (bundle/engine_fingerprint.py); None: not in our
    layout `vllm`.
    """
    index_sha256: str | None = None
    """Of the file's index as it was checked; the loader compares it."""
    verification: str = DIGESTS
    """How it is authenticated, one of bundle/trust.py's MODES."""
    check_digests: bool = True
    """Whether the SHA-256 of each tensor is compared while it is read."""
    digests: str | None = None
    """SHA-256 digests of a manifest in hex, joined in file order; None: those of the headers."""
    has_head: bool = False
    """Whether the file has an `lm_head`, also where config.json says that it is tied (`untie`)."""


@dataclass(frozen=True)
class PackedDraft:
    """The bundle's own draft model (packing/draft_checkpoint.py), which this start serves with."""

    directory: str
    """Where vLLM finds its configuration; the loader recognises the draft by it."""
    shard: Shard


@dataclass(frozen=True)
class Start:
    """What a process of a start takes over from its parent."""

    settings: Settings
    plan: LaunchPlan
    shards: tuple[Shard, ...] = ()
    processors: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))
    """CPUs that this container may use; vLLM binds its workers to some of them."""
    prefetched: str | None = None
    """Path of the memory into which the weights are prefetched; None: they are not."""
    draft: PackedDraft | None = None

    def shard(self, rank: int) -> Shard:
        """The file that `rank` reads: its own, or the one that all ranks share."""
        return self.shards[rank] if len(self.shards) > 1 else self.shards[0]


def publish_start(start: Start) -> str:
    """Leave a start for child processes; the reference goes into `HANDOFF_VARIABLE`."""
    return handoff.publish_json(encode(start))


def receive_start(reference: str) -> Start:
    """The start that a parent left at `reference`. Raises TensorserveError."""
    return decode(Start, handoff.receive_json(reference))


def current_start(environ: Mapping[str, str], arguments: tuple[str, ...]) -> Start:
    """The start that this process belongs to: handed over by `up`, else of `environ` itself.

    `arguments` are for `vllm serve`, where nothing is handed over. Raises TensorserveError.
    """
    if HANDOFF_VARIABLE in environ:
        return receive_start(environ[HANDOFF_VARIABLE])
    settings = Settings.from_environment(environ)
    return Start(settings, make_plan(settings, arguments))
