"""What the processes of one start share: settings, arguments, and which files were checked.

It is handed from parent to child in memory (`tensorserve.handoff`), secrets included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensorserve import handoff
from tensorserve.settings import HANDOFF_VARIABLE, Settings, handed_over
from tensorserve.verification import DIGESTS


@dataclass(frozen=True)
class Shard:
    """One file of weights, as the checks found it."""

    uri: str
    version: str | None
    """What pins the object; the loader refuses another one."""
    size: int
    headers_sha256: str | None = None
    """Of all tensors' headers, where there is a manifest."""
    fingerprint: Mapping[str, Any] | None = None
    """Of the engine whose parameters it holds (fingerprint.py); None: not in our layout `vllm`."""
    index_sha256: str | None = None
    """Of the file's index, as it was checked: the loader must find the same."""
    verification: str = DIGESTS
    """What vouches for it, one of verification.MODES."""
    check_digests: bool = True
    """Whether each tensor's SHA-256 is compared as it comes."""
    digests: str | None = None
    """Those of a manifest, in hex, one after another in file order; None: the headers' own."""
    has_head: bool = False
    """Whether there is an `lm_head` in it, which config.json may deny."""


@dataclass(frozen=True)
class Start:
    """What a process of a start takes over from its parent."""

    settings: Settings
    arguments: tuple[str, ...]
    shards: tuple[Shard, ...]
    processors: frozenset[int] = frozenset()
    """That this container may use; vLLM binds its workers to some of them."""
    prefetched: str | None = None
    """Where the memory is into which the weights are fetched ahead."""

    def shard(self, rank: int) -> Shard:
        """The file that `rank` reads: its own, or the one that all ranks share."""
        return self.shards[rank] if len(self.shards) > 1 else self.shards[0]


def publish_start(
    environ: Mapping[str, str],
    settings: Settings,
    arguments: tuple[str, ...],
    shards: tuple[Shard, ...] = (),
    prefetched: str | None = None,
) -> str:
    """Leave a start for child processes; the reference goes into `HANDOFF_VARIABLE`."""
    environment, origins = handed_over(environ, settings)
    return handoff.publish_json(
        {
            "environment": environment,
            "origins": origins,
            "arguments": list(arguments),
            "shards": [asdict(shard) for shard in shards],
            "processors": sorted(os.sched_getaffinity(0)),
            "prefetched": prefetched,
        }
    )


def receive_start(reference: str) -> Start:
    """The start that a parent left at `reference`. Raises TensorserveError."""
    payload = handoff.receive_json(reference)
    return Start(
        settings=Settings.from_environment(payload["environment"], payload["origins"]),
        arguments=tuple(payload["arguments"]),
        shards=tuple(Shard(**shard) for shard in payload["shards"]),
        processors=frozenset(payload["processors"]),
        prefetched=payload["prefetched"],
    )


def current_start(
    environ: Mapping[str, str], arguments: tuple[str, ...]
) -> tuple[Start, Mapping[str, str]]:
    """The start that this process belongs to: handed over by `up`, else from `environ` itself."""
    if HANDOFF_VARIABLE in environ:
        start = receive_start(environ[HANDOFF_VARIABLE])
        payload = handoff.receive_json(environ[HANDOFF_VARIABLE])
        return start, payload["environment"]
    return Start(Settings.from_environment(environ), arguments, ()), environ
