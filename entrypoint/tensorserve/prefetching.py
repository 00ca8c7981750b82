"""Who fetches for all ranks of a machine, and ahead of them.

Ahead: a process that `serve` makes just before it becomes vLLM. Where there is none, a thread of
the first of several ranks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from tensorserve import sources
from tensorserve.host_memory import fetched_bytes, limit_of
from tensorserve.linux import hide_memory, run_on
from tensorserve.loading import LoadProgress
from tensorserve.loading.prefetch import Prefetcher
from tensorserve.loading.shared import SharedBlocks
from tensorserve.opening import access_for
from tensorserve.plan import LaunchPlan
from tensorserve.settings import Settings
from tensorserve.start import Shard
from tensorserve.telemetry import EventLog

_REPORT_SECONDS = 0.5
# vLLM's own start goes first: measured on two cores, see bench/README.md.
_NICENESS = 10


# With these, the ranks that read on this machine are others than the tensor-parallel ones.
_OTHER_PARALLELISM = (
    *("--nnodes", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
    *("--data-parallel-size-local", "-dpl"),
)


def start_prefetch(
    settings: Settings, plan: LaunchPlan, shards: tuple[Shard, ...], log: EventLog
) -> str | None:
    """Start the process where it helps; gives the memory's path for the loaders, else None.

    The process is nobody's child when this returns, and ends with the engine's process group.
    """
    if settings.prefetch == "off" or not may_share(shards):
        return None
    if any(word.partition("=")[0] in _OTHER_PARALLELISM for word in plan.argv):
        return None  # nobody could say when all ranks are past a byte
    (shard,) = shards
    shared = SharedBlocks.create(shard.size, shard.version, plan.tensor_parallel_size)
    path = shared.path
    child = os.fork()
    if child == 0:
        # Twice, so that vLLM, which this process is about to become, has no child to wait for.
        if os.fork() == 0:
            _run(settings, shard, shared, log)
        os._exit(0)
    os.waitpid(child, 0)
    return path


def may_share(shards: tuple[Shard, ...]) -> bool:
    """Whether one process could fetch for all ranks.

    Not where each rank has its own file, and reads it alone; nor what is no network's: the system's
    own cache is that memory.
    """
    return len(shards) == 1 and shards[0].uri.startswith(("s3://", "http://", "https://"))


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
    shared = SharedBlocks.create(shard.size, shard.version, ranks)
    own = shared.reopen()
    own.hold()  # before anybody looks whether the fetcher lives

    def run() -> None:
        run_on(processors)
        # Whatever goes wrong: the loaders fetch for themselves, and say it.
        with suppress(Exception):
            _fetch(settings, shard, own, budget, log)

    threading.Thread(target=run, name="tensorserve-fetch", daemon=True).start()
    return shared.path


def prefetch_budget(settings: Settings, ranks: int) -> int:
    """Bytes of the host memory limit that may hold what was fetched ahead, or for all `ranks`."""
    return fetched_bytes(limit_of(settings), ranks)


def _run(settings: Settings, shard: Shard, shared: SharedBlocks, log: EventLog) -> None:
    """In the new process. Whatever goes wrong: the loader fetches for itself, and says it."""
    try:
        os.nice(_NICENESS)
        own = shared.reopen()
        hide_memory()  # it has the settings, and nobody opens anything of it
        _fetch(settings, shard, own, prefetch_budget(settings, shared.ranks), log)
    finally:
        os._exit(0)


def _fetch(
    settings: Settings, shard: Shard, shared: SharedBlocks, budget: int, log: EventLog | None
) -> None:
    """Fill the memory, and report it. Lets go of it at the end, whatever happens."""
    progress = LoadProgress()
    last = 0.0

    def report() -> None:
        nonlocal last
        if log is not None and time.monotonic() - last > _REPORT_SECONDS:
            last = time.monotonic()
            counts = progress.snapshot()
            log.emit(
                "prefetch_progress",
                bytes=progress.received_bytes(),
                requests=counts["requests"],
                retries=counts["retries"],
            )

    try:
        source = sources.open_source(shard.uri, access_for(settings), progress)
        if shared.fits(source):
            Prefetcher(source, shared, budget, progress).run(report)
            last = 0.0
            report()
    finally:
        shared.release()
