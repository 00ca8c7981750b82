"""Did all ranks find the same bundle, if each rank has read the manifest itself?

Needed if vLLM was started without `tensorserve serve`: a server could give two ranks two bundles
with the same key, each of which passes every check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tensorserve.errors import CorruptError
from tensorserve.launch.context import Shard, Start


def same_for_all(make: Callable[[], Start], groups: Sequence[Any]) -> Start:
    """The result of `make`, if it describes the same weights in every rank of `groups`.

    `groups`: torch's process groups for the CPU. All ranks of a group must call this function, one
    group after another. Raises CorruptError if the ranks differ, and the exceptions of `make`; then
    every rank raises, so that none waits for another.
    """
    start: Start | None = None
    failure: Exception | None = None
    try:
        start = make()
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        failure = error
    mine = _digest(_weights(start)) if start is not None else None
    for group in groups:
        found: list[str | None] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, mine, group=group)
        others = {digest for digest in found if digest is not None}
        if mine is None or None in found:
            mine = None  # the ranks of the next group must fail as well
        elif len(others) > 1:
            mine = None
            failure = CorruptError(
                "The ranks of this engine found different bundles.",
                hint="The bundle was replaced while it was read, or the server gives each rank "
                "another one. Start again; TENSORSERVE_MANIFEST_SHA256 pins one bundle.",
            )
    if failure is not None:
        raise failure
    if mine is None or start is None:
        raise CorruptError(
            "Another rank of this engine could not check the bundle.",
            hint="That rank's log has the error.",
        )
    return start


def _weights(start: Start) -> tuple[Shard, ...]:
    return (*start.shards, start.draft.shard) if start.draft else start.shards


def _digest(shards: Sequence[Shard]) -> str:
    """SHA-256 of everything that identifies the shards' content, without their location."""
    found = [
        [one.size, one.index_sha256, one.headers_sha256, one.digests, one.fingerprint]
        for one in shards
    ]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
