"""How long does a thread that wakes up wait for the interpreter's lock, and for a processor?"""

from __future__ import annotations

import threading
import time
from statistics import median, quantiles

_NAP = 0.0005  # seconds
# An idle machine's timer is not as late as that.
_LATE = 0.0005


class LockProbe:
    """`with LockProbe() as probe:`; afterwards `found` tells. Of one process.

    The probe sleeps, which lets go of the lock, and needs it to go on. What it is late by beyond
    the timer's own lateness it waited for the lock, or for a processor where all are busy.
    """

    def __init__(self) -> None:
        self._late: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> LockProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def found(self) -> dict[str, float]:
        """Lateness in seconds: median, 99th percentile; the share of wakings that were late."""
        late = self._late
        if len(late) < 2:
            return {}
        return {
            "lock_median": median(late),
            "lock_p99": quantiles(late, n=100)[-1],
            "lock_share": sum(one > _LATE for one in late) / len(late),
        }

    def _work(self) -> None:
        while not self._stopped.is_set():
            target = time.perf_counter() + _NAP
            time.sleep(_NAP)
            self._late.append(time.perf_counter() - target)
