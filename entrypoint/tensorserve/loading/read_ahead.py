"""Bytes of a source in order, fetched ahead by a few connections into bounded memory.

For a reader that takes one byte after the other and knows nothing of ranges.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator

from tensorserve.linux import run_on
from tensorserve.loading.progress import LoadProgress
from tensorserve.sources import Source

# Object stores keep an object in pieces of 4 MiB, 8 MiB or more; blocks end where these do.
BLOCK_BYTES = 4 * 1024**2
# A connection has the next block on its way while one of its blocks waits to be taken.
_BLOCKS_A_CONNECTION = 2


class ReadAhead:
    """The bytes of `ranges`, to be taken in order by one thread.

    An error of the source is raised where its bytes are taken. `stop` ends the threads.
    """

    def __init__(
        self,
        source: Source,
        ranges: Iterable[tuple[int, int]],
        progress: LoadProgress,
        *,
        connections: int,
        limit: int,
        processors: Collection[int],
    ) -> None:
        """`ranges`: (start, stop) in the file, ascending. `limit`: bytes of memory, two blocks at
        least. `processors`: those that the threads may run on.
        """
        self._source = source
        self._progress = progress
        self._processors = processors
        self._blocks = list(_blocks(ranges))
        self._most = max(2, min(_BLOCKS_A_CONNECTION * connections, limit // BLOCK_BYTES))
        self._changed = threading.Condition()
        self._there: dict[int, bytearray] = {}
        self._spare: list[bytearray] = []
        self._next = 0
        """The first block that no connection has."""
        self._taken = 0
        """The block that is taken from."""
        self._error: BaseException | None = None
        self._stopped = False
        if self._blocks:
            # What fetches ahead must not wait where the file begins with what is left out.
            source.passed(self._blocks[0][0])
        for number in range(min(connections, self._most, len(self._blocks))):
            name = f"tensorserve-ahead-{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, where the last read ended or a later range begins.

        Raises the source's errors, and RuntimeError once stopped.
        """
        while len(buffer):
            start, stop = self._blocks[self._taken]
            if not start <= offset < stop:
                raise RuntimeError(f"byte {offset} is read out of order")
            memory = self._wait_for(self._taken)
            count = min(len(buffer), stop - offset)
            buffer[:count] = memory[offset - start : offset - start + count]
            buffer = buffer[count:]
            offset += count
            if offset == stop:
                self._give_back()

    def stop(self) -> None:
        """End the threads; one that is in a read ends with it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait_for(self, number: int) -> memoryview:
        with self._changed:
            while number not in self._there:
                if self._stopped:
                    raise RuntimeError("the load has ended")
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return memoryview(self._there[number])

    def _give_back(self) -> None:
        with self._changed:
            self._spare.append(self._there.pop(self._taken))
            self._taken += 1
            self._changed.notify_all()
        if self._taken < len(self._blocks):
            self._source.passed(self._blocks[self._taken][0])
        else:
            self._source.passed(self._source.size)

    def _work(self) -> None:
        run_on(self._processors)
        try:
            while (claimed := self._claim()) is not None:
                number, memory = claimed
                start, stop = self._blocks[number]
                began = time.monotonic()
                self._source.read_into(start, memoryview(memory)[: stop - start])
                self._progress.stage("fetch", 0, time.monotonic() - began)
                with self._changed:
                    self._there[number] = memory
                    self._changed.notify_all()
        # The thread that takes the bytes raises it.
        except BaseException as error:  # noqa: BLE001
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _claim(self) -> tuple[int, bytearray] | None:
        """The next block and memory for it; None where there is nothing more to fetch."""
        with self._changed:
            while self._next >= self._taken + self._most and not self._stopped:
                self._changed.wait()
            if self._stopped or self._error is not None or self._next >= len(self._blocks):
                return None
            self._next += 1
            memory = self._spare.pop() if self._spare else bytearray(BLOCK_BYTES)
            return self._next - 1, memory


def _blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges, neighbours put together, cut at multiples of BLOCK_BYTES in the file."""
    for start, stop in _merged(ranges):
        while start < stop:
            end = min((start // BLOCK_BYTES + 1) * BLOCK_BYTES, stop)
            yield start, end
            start = end


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    before: tuple[int, int] | None = None
    for start, stop in ranges:
        if before is not None and before[1] == start:
            before = before[0], stop
            continue
        if before is not None:
            yield before
        before = start, stop
    if before is not None:
        yield before
