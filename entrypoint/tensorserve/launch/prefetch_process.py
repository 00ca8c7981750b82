"""Who fetches the weights once for all ranks of a machine?

A prefetch process that `serve` starts just before it becomes vLLM, so that bytes arrive while vLLM
imports. Where there is none, a thread of rank 0.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from tensorserve import sources
from tensorserve.config.access import access_for
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.settings import Settings
from tensorserve.launch.context import Shard
from tensorserve.launch.memory_budget import prefetch_budget
from tensorserve.linux import hide_memory, run_on
from tensorserve.loading import LoadProgress
from tensorserve.loading.block_cache import BlockCache
from tensorserve.loading.prefetch import Prefetcher
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.telemetry import EventLog
from tensorserve.telemetry.schema import PrefetchProgressed


def start_prefetch(
    settings: Settings, plan: LaunchPlan, shards: tuple[Shard, ...], log: EventLog
) -> str | None:
    """Start the prefetch process where it helps. Gives the path of its memory, else None.

    The process is reparented when this returns, and ends with the engine's process group.
    """
    if settings.prefetch == "off" or not may_share(shards):
        return None
    if not plan.options.parallel.only_tensor:
        return None  # it would not be known when all ranks have read a byte
    (shard,) = shards
    shared = BlockCache.create(shard.size, shard.version, plan.tensor_parallel_size)
    path = shared.path
    child = os.fork()
    if child == 0:
        # A double fork, so that vLLM, which this process becomes, has no child to reap.
        if os.fork() == 0:
            _run(settings, shard, shared, log)
        os._exit(0)
    os.waitpid(child, 0)
    return path


def may_share(shards: tuple[Shard, ...]) -> bool:
    """Whether one process could fetch for all ranks.

    Not where each rank has a file of its own; nor for local files, which the page cache shares.
    """
    return len(shards) == 1 and sources.is_remote(shards[0].uri)


def fetch_for_ranks(
    settings: Settings,
    shard: Shard,
    ranks: int,
    *,
    budget: int,
    processors: Collection[int],
    log: EventLog | None,
) -> str:
    """Fetch for `ranks` loaders on this machine, in a thread; gives the memory's path for them.

    `budget`: bytes that may be in it. `processors`: on which the thread may run, wherever the
    caller is bound to.
    """
    shared = BlockCache.create(shard.size, shard.version, ranks)
    own = shared.reopen()
    own.hold()  # before a reader checks whether the fetcher lives

    def run() -> None:
        run_on(processors)
        # On any failure the loaders fetch for themselves, and report it.
        with suppress(Exception):
            _fetch(settings, shard, own, budget, log)

    threading.Thread(target=run, name="tensorserve-fetch", daemon=True).start()
    return shared.path


def _run(settings: Settings, shard: Shard, shared: BlockCache, log: EventLog) -> None:
    """In the new process. On any failure the loader fetches for itself, and reports it."""
    try:
        os.nice(DEFAULTS.prefetch_niceness)
        own = shared.reopen()
        hide_memory()  # it has the settings, and no other process opens its memory
        _fetch(settings, shard, own, prefetch_budget(settings, shared.ranks), log)
    finally:
        os._exit(0)


def _fetch(
    settings: Settings, shard: Shard, shared: BlockCache, budget: int, log: EventLog | None
) -> None:
    """Fill the memory and report progress. Releases the memory in any case."""
    progress = LoadProgress()
    last = 0.0
    told: PrefetchProgressed | None = None

    def report() -> None:
        nonlocal last, told
        if log is None or time.monotonic() - last <= DEFAULTS.prefetch_report_seconds:
            return
        last = time.monotonic()
        counts = progress.snapshot()
        now = PrefetchProgressed(progress.received_bytes(), counts.requests, counts.retries)
        # All may be there long before vLLM asks for it.
        if now != told:
            told = now
            log.emit(now)

    try:
        source = sources.open_source(shard.uri, access_for(settings), progress)
        if shared.fits(source):
            connections = settings.fetch_connections
            Prefetcher(source, shared, budget, progress, connections).run(report)
            last = 0.0
            report()
    finally:
        shared.release()
