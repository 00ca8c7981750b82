"""How does a reader that reads a file in order get its bytes without waiting for each request?

A few connections fetch the next ranges into bounded memory, for tensorizer's reader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator

from tensorserve.linux import run_on
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.ranges import joined
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Source
from tensorserve.telemetry.names import Stage

_BLOCK_BYTES = DEFAULTS.read_ahead_bytes


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
        self._most = max(2, min(DEFAULTS.read_ahead_blocks * connections, limit // _BLOCK_BYTES))
        self._changed = threading.Condition()
        self._received: dict[int, bytearray] = {}
        self._spare: list[bytearray] = []
        self._next = 0
        """The first block that was not requested yet."""
        self._taken = 0
        """The block whose bytes are taken next."""
        self._error: BaseException | None = None
        self._stopped = False
        if self._blocks:
            # The prefetch process must not wait for blocks that this load leaves out.
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
            while number not in self._received:
                if self._stopped:
                    raise RuntimeError("the load has ended")
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            return memoryview(self._received[number])

    def _give_back(self) -> None:
        with self._changed:
            self._spare.append(self._received.pop(self._taken))
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
                self._progress.stage(Stage.FETCH, 0, time.monotonic() - began)
                with self._changed:
                    self._received[number] = memory
                    self._changed.notify_all()
        # Raised in the thread that takes the bytes.
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
            memory = self._spare.pop() if self._spare else bytearray(_BLOCK_BYTES)
            return self._next - 1, memory


def _blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges, adjacent ones joined, cut at multiples of _BLOCK_BYTES in the file."""
    for start, stop in joined(ranges):
        while start < stop:
            end = min((start // _BLOCK_BYTES + 1) * _BLOCK_BYTES, stop)
            yield start, end
            start = end
