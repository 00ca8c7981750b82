"""How far is the load of one rank: bytes and seconds of each stage, requests and retries?"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from ctypes import c_int64

from tensorserve.telemetry.names import Stage
from tensorserve.telemetry.schema import LoadCounts


class LoadProgress:
    """Counters that many threads add to; also the FetchObserver of the sources."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._retries: Counter[str] = Counter()
        self._requests = 0
        self._received = 0
        self._counters: list[c_int64] = []

    def stage(self, name: str, count: int, seconds: float) -> None:
        """`count` bytes went through `name` (fetch, decrypt, copy), in `seconds` of a thread."""
        with self._lock:
            self._bytes[name] += count
            self._seconds[name] += seconds

    def request(self) -> None:
        """A request was sent."""
        with self._lock:
            self._requests += 1

    def retry(self, reason: str) -> None:
        """A request is sent again because of `reason`."""
        with self._lock:
            self._retries[reason] += 1

    def received(self, count: int) -> None:
        """`count` payload bytes were received, retries included; `fetch` counts those kept."""
        with self._lock:
            self._received += count

    def received_bytes(self) -> int:
        """All payload bytes received so far."""
        return self._received + sum(counter.value for counter in self._counters)

    def counter(self) -> c_int64:
        """See `CountingObserver`."""
        made = c_int64()
        with self._lock:
            self._counters.append(made)
        return made

    def snapshot(self) -> LoadCounts:
        """All of it so far, cumulative."""
        with self._lock:
            return LoadCounts(
                fetch=self._bytes[Stage.FETCH],
                decrypt=self._bytes[Stage.DECRYPT],
                copy=self._bytes[Stage.COPY],
                fetch_seconds=round(self._seconds[Stage.FETCH], 6),
                decrypt_seconds=round(self._seconds[Stage.DECRYPT], 6),
                copy_seconds=round(self._seconds[Stage.COPY], 6),
                requests=self._requests,
                retries=dict(self._retries),
            )


def report_every(seconds: float, report: Callable[[], None]) -> Callable[[], None]:
    """Call `report` every `seconds` until the returned function is called, and once more then."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            report()

    thread = threading.Thread(target=run, name="tensorserve-progress", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()
        report()

    return end
