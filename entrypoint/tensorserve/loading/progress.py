"""What one rank's load has done so far: bytes and seconds per stage, requests and retries."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any


class LoadProgress:
    """Counters that many threads add to; also the FetchObserver of the sources."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._retries: Counter[str] = Counter()
        self._requests = 0
        self._received = 0

    def stage(self, name: str, count: int, seconds: float) -> None:
        """`count` bytes went through fetch, decrypt or copy; it took `seconds` of a thread."""
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
        """Payload bytes off the wire, retries included; `fetch` counts what is kept instead."""
        with self._lock:
            self._received += count

    def received_bytes(self) -> int:
        """All of them."""
        return self._received

    def snapshot(self) -> dict[str, Any]:
        """The fields of a `load_progress` event, cumulative."""
        with self._lock:
            return {
                **{stage: self._bytes[stage] for stage in ("fetch", "decrypt", "copy")},
                **{
                    f"{stage}_seconds": round(self._seconds[stage], 6)
                    for stage in ("fetch", "decrypt", "copy")
                },
                "requests": self._requests,
                "retries": dict(self._retries),
            }


def report_every(seconds: float, report: Callable[[], None]) -> Callable[[], None]:
    """Call `report` every so often until the returned function is called (and once more then)."""
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
