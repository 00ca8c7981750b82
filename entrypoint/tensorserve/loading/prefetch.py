"""How are sealed bytes fetched before the loader needs them, and how does it get them?

While vLLM imports, a process of its own fills shared memory (`block_cache`) in file order, for all
ranks of a machine; what no rank needs any more makes room for the next block. A single rank ends
that process when it begins, takes what is there, and goes on with its own connections. Several
ranks let it go on, so that no byte comes over the network twice. Where it has died, each rank
fetches for itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from tensorserve.loading.block_cache import ABSENT, BLOCK_BYTES, PRESENT, REQUESTED, BlockCache
from tensorserve.loading.concurrency import Concurrency, prefetch_start
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.cpu_idle import CpuIdle
from tensorserve.loading.scheduler import moving_average, straggler_threshold
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Filling, Source


class Prefetcher:
    """Fills `cache` from `source`, in file order, with at most `budget` bytes not yet needed."""

    def __init__(
        self,
        source: Source,
        cache: BlockCache,
        budget: int,
        progress: LoadProgress,
        connections: int | None = None,
    ) -> None:
        """`connections`: None for as many as help."""
        self._source = source
        self._cache = cache
        self._budget = max(1, budget // BLOCK_BYTES)
        self._progress = progress
        self._next = 0
        """The first block that was not requested yet."""
        self._freed = 0
        """The first block that was not freed yet."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        processors = os.sched_getaffinity(0)
        self._concurrency = Concurrency(
            connections or prefetch_start(len(processors)),
            connections or DEFAULTS.most_connections,
            progress.received_bytes,
            idle=CpuIdle(processors),
        )

    def run(
        self,
        report: Callable[[], None] = lambda: None,
        seconds: float = DEFAULTS.prefetch_step_seconds,
    ) -> None:
        """Fetch until all blocks are there, all ranks have passed them, or the loader says stop.

        Ends without an error where the source fails: the loader meets the same error, and raises
        it where it is seen.
        """
        self._cache.hold()
        threads: list[threading.Thread] = []
        pause = 0.0
        while not self._ended.is_set():
            most = min(self._concurrency.target, self._cache.blocks, self._budget)
            while len(threads) < most:
                thread = threading.Thread(target=self._work, args=(len(threads),), daemon=True)
                threads.append(thread)
                thread.start()
            began = time.monotonic()
            while time.monotonic() - began < pause and not self._ended.wait(seconds / 5):
                self._free_passed()
            pause = self._concurrency.step()
            report()
            if self._cache.stopped or self._cache.all_passed:
                break
        for thread in threads:
            thread.join()
        if self._cache.all_passed:
            self._cache.free_all()
        self._cache.release()
        report()

    def _work(self, number: int) -> None:
        try:
            while not self._ended.is_set():
                if number >= self._concurrency.target:
                    self._ended.wait(DEFAULTS.prefetch_surplus_seconds)
                    continue
                block = self._claim()
                if block is None:
                    if self._cache.stopped or self._next >= self._cache.blocks:
                        return
                    self._ended.wait(DEFAULTS.prefetch_poll_seconds)
                    continue
                began = time.monotonic()
                try:
                    self._source.read_into(block * BLOCK_BYTES, self._cache.block(block))
                except BaseException:
                    self._cache.set_state(block, ABSENT)
                    raise
                self._cache.set_state(block, PRESENT)
                self._took(time.monotonic() - began)
        # The loader will ask for the same bytes, meet the same error, and raise it.
        except Exception:  # noqa: BLE001
            self._ended.set()

    def _took(self, seconds: float) -> None:
        with self._lock:
            average = self._cache.average_seconds
            self._cache.set_average_seconds(moving_average(average or seconds, seconds))

    def _claim(self) -> int | None:
        with self._lock:
            needed = self._needed()
            self._next = max(self._next, needed)
            if (
                self._cache.stopped
                or self._next >= self._cache.blocks
                or self._next >= needed + self._budget
            ):
                return None
            self._cache.set_state(self._next, REQUESTED)
            self._next += 1
            return self._next - 1

    def _needed(self) -> int:
        """The first block that some rank still needs."""
        return min(self._cache.position(r) for r in range(self._cache.ranks)) // BLOCK_BYTES

    def _free_passed(self) -> None:
        while self._freed < self._needed():
            if self._cache.state(self._freed) == PRESENT:
                self._cache.free(self._freed)
            self._freed += 1


class PrefetchedSource(Source):
    """`source`, of which some blocks are in memory already; for one rank."""

    def __init__(
        self, source: Source, cache: BlockCache, rank: int, progress: LoadProgress
    ) -> None:
        self._source = source
        self._cache = cache
        self._rank = rank
        self._progress = progress
        self.name = source.name
        self.size = source.size
        self.version = source.version
        self.pinned = source.pinned
        self.remote = source.remote
        self.transport = source.transport
        self._freed = 0
        self._given_up = False
        self._late: set[int] = set()
        if cache.ranks == 1:
            cache.stop()

    def read_parts(self, offset: int, parts: Filling) -> None:
        """As `Source.read_parts`: from the cache what is there, the rest from the source."""
        stop = offset + parts.length
        while not parts.finished:
            place = offset + parts.done
            block = place // BLOCK_BYTES
            if self._is_present(block):
                wanted = parts.wanted
                count = min(len(wanted), (block + 1) * BLOCK_BYTES - place)
                self._cache.read_into(place, wanted[:count])
                self._progress.received(count)
                parts.add(count)
            elif parts.begun or self._any_requested(block + 1, stop):
                wanted = parts.wanted
                count = min(len(wanted), (block + 1) * BLOCK_BYTES - place)
                self._source.read_into(place, wanted[:count])
                parts.add(count)
            else:
                self._source.read_parts(place, parts.rest())
                return

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """See `Source`: the cache has the damaged bytes."""
        self._source.read_again(offset, buffer)

    def hurry(self, thread: int) -> None:
        """See `Source`."""
        self._source.hurry(thread)

    def passed(self, offset: int) -> None:
        """See `Source`."""
        if offset > self._cache.position(self._rank):
            self._cache.advance(self._rank, offset)
            if self._cache.ranks == 1:
                self._free_before(offset)

    def close(self) -> None:
        """Close the source as well; this rank needs no block any more."""
        self.passed(self.size)
        if self._cache.all_passed and not self._cache.held:
            self._cache.free_all()  # otherwise the prefetch process does it
        self._source.close()

    def _free_before(self, offset: int) -> None:
        stop = min(offset // BLOCK_BYTES, self._cache.blocks)
        for block in range(self._freed, stop):
            if self._cache.state(block) == PRESENT:
                self._cache.free(block)
        self._freed = max(self._freed, stop)

    def _is_present(self, block: int) -> bool:
        """Whether `block` is in memory; waits for it where the prefetch process will fetch it.

        If a prefetched block is late, the loader fetches it itself: one slow connection of the
        prefetch process delays nothing.
        """
        if (block + 1) * BLOCK_BYTES <= self._cache.position(self._rank):
            return False  # read a second time: it may be freed at any moment
        began = time.monotonic()
        while True:
            state = self._cache.state(block)
            if state == PRESENT:
                return True
            if state == ABSENT and self._cache.stopped:
                return False
            waited = time.monotonic() - began
            if state == REQUESTED and (block in self._late or waited > self._threshold()):
                self._late.add(block)
                return False
            if self._given_up or waited > DEFAULTS.prefetch_wait_seconds:
                # A rank that hangs holds up the prefetch process; this one goes on without it.
                self._given_up = True
                return False
            if not self._cache.held:
                return self._cache.state(block) == PRESENT
            time.sleep(DEFAULTS.prefetch_poll_seconds)

    def _threshold(self) -> float:
        """Seconds after which a requested block is late."""
        average = self._cache.average_seconds
        return straggler_threshold(average) if average else DEFAULTS.prefetch_wait_seconds

    def _any_requested(self, block: int, stop: int) -> bool:
        """Whether the prefetch process has, or will have, a block from `block` to offset `stop`."""
        last = min(-(-stop // BLOCK_BYTES), self._cache.blocks)
        return any(self._cache.state(number) != ABSENT for number in range(block, last))
