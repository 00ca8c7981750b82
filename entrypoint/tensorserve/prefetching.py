"""The process that fetches weights ahead: made by `serve`, just before it becomes vLLM."""

from __future__ import annotations

import os
import time

from tensorserve import sources
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
    if settings.prefetch == "off" or len(shards) != 1:
        return None  # each rank has its own file, and reads it alone
    if any(word.partition("=")[0] in _OTHER_PARALLELISM for word in plan.argv):
        return None  # nobody could say when all ranks are past a byte
    (shard,) = shards
    if not shard.uri.startswith(("s3://", "http://", "https://")):
        return None  # a file: the system's own cache is that memory
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


def prefetch_budget(settings: Settings) -> int:
    """Bytes of the host memory limit that may hold what was fetched ahead."""
    return settings.host_memory_limit * 3 // 8


def _run(settings: Settings, shard: Shard, shared: SharedBlocks, log: EventLog) -> None:
    """In the new process. Whatever goes wrong: the loader fetches for itself, and says it."""
    try:
        os.nice(_NICENESS)
        progress = LoadProgress()
        source = sources.open_source(shard.uri, access_for(settings), progress)
        own = shared.reopen()
        last = 0.0

        def report() -> None:
            nonlocal last
            if time.monotonic() - last > _REPORT_SECONDS:
                last = time.monotonic()
                counts = progress.snapshot()
                log.emit(
                    "prefetch_progress",
                    bytes=progress.received_bytes(),
                    requests=counts["requests"],
                    retries=counts["retries"],
                )

        if own.fits(source):
            Prefetcher(source, own, prefetch_budget(settings), progress).run(report)
            last = 0.0
            report()
    finally:
        os._exit(0)
