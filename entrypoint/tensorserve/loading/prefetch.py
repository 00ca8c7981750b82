"""Sealed bytes fetched ahead: while vLLM imports, a process of its own fills shared memory.

One fetcher for all ranks of a machine: they take from the memory what is there, in file order, and
what no rank needs any more makes room for the next. A single rank ends the fetcher when it begins,
takes what it has fetched, and goes on with the network itself; several ranks let it go on, so that
no byte comes over the network twice. Where the fetcher has died, each rank fetches for itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from tensorserve.loading.connections import REMOTE_MOST, Connections, remote_start
from tensorserve.loading.lateness import late_after, usual_with
from tensorserve.loading.processors import Spare
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.shared import ABSENT, BLOCK_BYTES, ON_ITS_WAY, THERE, SharedBlocks
from tensorserve.sources import Source
from tensorserve.sources.parts import Filling, ReadsParts

_POLL_SECONDS = 0.002
# For one block that the fetcher does not begin.
_WAIT_SECONDS = 30.0


class Prefetcher:
    """Fills `shared` from `source`, in file order, with at most `budget` bytes not yet needed."""

    def __init__(
        self, source: Source, shared: SharedBlocks, budget: int, progress: LoadProgress
    ) -> None:
        self._source = source
        self._shared = shared
        self._budget = max(1, budget // BLOCK_BYTES)
        self._progress = progress
        self._next = 0
        self._freed = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        processors = os.sched_getaffinity(0)
        self._connections = Connections(
            remote_start(len(processors)),
            REMOTE_MOST,
            progress.received_bytes,
            spare=Spare(processors),
        )
        self._running = 0

    def run(self, report: Callable[[], None] = lambda: None, seconds: float = 0.25) -> None:
        """Fetch until everything is there, all ranks are past it, or the loader says stop.

        Ends without an error where the source fails: the loader meets the same error, and says it.
        """
        self._shared.hold()
        threads: list[threading.Thread] = []
        pause = 0.0
        while not self._ended.is_set():
            while len(threads) < min(self._connections.target, self._shared.blocks, self._budget):
                thread = threading.Thread(target=self._work, args=(len(threads),), daemon=True)
                threads.append(thread)
                thread.start()
            began = time.monotonic()
            while time.monotonic() - began < pause and not self._ended.wait(seconds / 5):
                self._free_passed()
            pause = self._connections.step()
            report()
            if self._shared.stopped or self._shared.all_passed:
                break
        for thread in threads:
            thread.join()
        if self._shared.all_passed:
            self._shared.free_all()
        self._shared.release()
        report()

    def _work(self, number: int) -> None:
        try:
            while not self._ended.is_set():
                if number >= self._connections.target:
                    self._ended.wait(0.05)
                    continue
                block = self._claim()
                if block is None:
                    if self._shared.stopped or self._next >= self._shared.blocks:
                        return
                    self._ended.wait(_POLL_SECONDS)
                    continue
                began = time.monotonic()
                try:
                    self._source.read_into(block * BLOCK_BYTES, self._shared.block(block))
                except BaseException:
                    self._shared.set_state(block, ABSENT)
                    raise
                self._shared.set_state(block, THERE)
                self._took(time.monotonic() - began)
        # The loader will ask for the same bytes and meet the same error, where somebody reads it.
        except Exception:  # noqa: BLE001
            self._ended.set()

    def _took(self, seconds: float) -> None:
        with self._lock:
            usual = self._shared.usual_seconds
            self._shared.set_usual_seconds(usual_with(usual or seconds, seconds))

    def _claim(self) -> int | None:
        with self._lock:
            needed = self._needed()
            self._next = max(self._next, needed)
            if (
                self._shared.stopped
                or self._next >= self._shared.blocks
                or self._next >= needed + self._budget
            ):
                return None
            self._shared.set_state(self._next, ON_ITS_WAY)
            self._next += 1
            return self._next - 1

    def _needed(self) -> int:
        """The first block that some rank still needs."""
        return min(self._shared.position(r) for r in range(self._shared.ranks)) // BLOCK_BYTES

    def _free_passed(self) -> None:
        while self._freed < self._needed():
            if self._shared.state(self._freed) == THERE:
                self._shared.free(self._freed)
            self._freed += 1


class PrefetchedSource(ReadsParts):
    """`source`, of which some blocks are in memory already; for one rank."""

    def __init__(
        self, source: Source, shared: SharedBlocks, rank: int, progress: LoadProgress
    ) -> None:
        self._source = source
        self._shared = shared
        self._rank = rank
        self._progress = progress
        self.name = source.name
        self.size = source.size
        self.version = source.version
        self.pinned = source.pinned
        self.remote = source.remote
        self._freed = 0
        self._given_up = False
        self._late: set[int] = set()
        if shared.ranks == 1:
            shared.stop()

    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """As `Source.read_parts`."""
        parts = _Counted(lengths, memory, on_part)
        filling = Filling(lengths, parts.memory, parts.on_part)
        while not filling.finished:
            place = offset + filling.done
            block = place // BLOCK_BYTES
            if self._comes(block):
                wanted = filling.wanted
                count = min(len(wanted), (block + 1) * BLOCK_BYTES - place)
                self._shared.read_into(place, wanted[:count])
                self._progress.received(count)
                filling.add(count)
            elif parts.begun or self._any_comes(block + 1, offset + filling.length):
                wanted = filling.wanted
                count = min(len(wanted), (block + 1) * BLOCK_BYTES - place)
                self._source.read_into(place, wanted[:count])
                filling.add(count)
            else:
                self._source.read_parts(place, *parts.rest())
                return

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """See `Source`: the memory has what came damaged."""
        self._source.read_again(offset, buffer)

    def hurry(self, thread: int) -> None:
        """See `Source`."""
        self._source.hurry(thread)

    def passed(self, offset: int) -> None:
        """Nothing before `offset` is needed any more."""
        if offset > self._shared.position(self._rank):
            self._shared.advance(self._rank, offset)
            if self._shared.ranks == 1:
                self._free_before(offset)

    def close(self) -> None:
        """Nothing is needed any more; the source is closed as well."""
        self.passed(self.size)
        if self._shared.all_passed and not self._shared.held:
            self._shared.free_all()  # else the fetcher does it
        self._source.close()

    def _free_before(self, offset: int) -> None:
        stop = min(offset // BLOCK_BYTES, self._shared.blocks)
        for block in range(self._freed, stop):
            if self._shared.state(block) == THERE:
                self._shared.free(block)
        self._freed = max(self._freed, stop)

    def _comes(self, block: int) -> bool:
        """Whether `block` is in memory; waits for it where the fetcher is about to bring it.

        What is late is read past it: one slow connection of the fetcher's delays nothing.
        """
        if (block + 1) * BLOCK_BYTES <= self._shared.position(self._rank):
            return False  # asked for a second time: it may be gone at any moment
        began = time.monotonic()
        while True:
            state = self._shared.state(block)
            if state == THERE:
                return True
            if state == ABSENT and self._shared.stopped:
                return False
            waited = time.monotonic() - began
            if state == ON_ITS_WAY and (block in self._late or waited > self._patience()):
                self._late.add(block)
                return False
            if self._given_up or waited > _WAIT_SECONDS:
                # A rank that hangs holds up the fetcher; this one goes on without it.
                self._given_up = True
                return False
            if not self._shared.held:
                return self._shared.state(block) == THERE
            time.sleep(_POLL_SECONDS)

    def _patience(self) -> float:
        usual = self._shared.usual_seconds
        return late_after(usual) if usual else _WAIT_SECONDS

    def _any_comes(self, block: int, stop: int) -> bool:
        last = min(-(-stop // BLOCK_BYTES), self._shared.blocks)
        return any(self._shared.state(number) != ABSENT for number in range(block, last))


class _Counted:
    """Remembers which part is being filled."""

    def __init__(
        self,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        self.number = 0
        self.begun = False
        self._lengths = lengths
        self._memory = memory
        self._on_part = on_part

    def rest(
        self,
    ) -> tuple[Sequence[int], Callable[[int], memoryview], Callable[[int], bool]]:
        """The parts that are not begun, for another read."""
        first = self.number
        return (
            self._lengths[first:],
            lambda part: self._memory(first + part),
            lambda part: self._on_part(first + part),
        )

    def memory(self, part: int) -> memoryview:
        self.begun = True
        return self._memory(part)

    def on_part(self, part: int) -> bool:
        self.number, self.begun = part + 1, False
        return self._on_part(part)
