"""How many connections help? Starts low and grows while the rate grows."""

from __future__ import annotations

import time
from collections.abc import Callable

from tensorserve.sources.base import MOST_CONNECTIONS

# A step by that factor must bring that much, else it is taken back.
_WORTH = {2: 1.3, 4: 1.5}
# As long as the rate follows a step that closely, each connection has a limit of its own, and the
# next step may be as large.
_LINEAR = 0.8
# Seconds until new connections run, and that a rate is measured over.
_SETTLE, _MEASURE = 0.15, 0.2
# A link may change: every so often one more step is tried.
_AGAIN = 3.0
REMOTE_START, REMOTE_MOST = 16, MOST_CONNECTIONS


class Connections:
    """The number of connections that shall work now: `target`.

    `received` gives the bytes received so far. Call `step` again and again; it returns the seconds
    until it wants to be called next. Hill climbing: fourfold, then twofold, as long as the rate
    follows.
    """

    def __init__(
        self,
        start: int,
        most: int,
        received: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target = start
        self._most = most
        self._received = received
        self._clock = clock
        self._before: tuple[int, float] | None = None  # connections and rate before the last step
        self._mark: tuple[float, int] | None = None
        self._factor = 4
        self._begun = False
        self._holding = start >= most

    def step(self) -> float:
        """Measure and decide."""
        now, received = self._clock(), self._received()
        if not self._begun:
            self._begun = True
            return _SETTLE
        if self._holding:
            self._holding = self.target >= self._most
            self._before = None
            self._mark = None
            return _SETTLE if not self._holding else _AGAIN
        if self._mark is None:
            self._mark = (now, received)
            return _MEASURE
        began, had = self._mark
        self._mark = None
        rate = (received - had) / max(now - began, 1e-6)
        if not rate:
            return _SETTLE  # nothing has come yet: no verdict
        factor = self._factor
        if self._before is not None:
            before, slower = self._before
            if rate < _WORTH[factor] * slower:
                self.target = before
                self._before = None
                self._factor = 2
                # After a step of four there is a number between.
                self._holding = factor == 2
                return _AGAIN if self._holding else _SETTLE
            if rate < _LINEAR * factor * slower:
                self._factor = factor = 2
        if self.target >= self._most:
            self._holding = True
            return _AGAIN
        self._before = (self.target, rate)
        self.target = min(self._most, self.target * factor)
        return _SETTLE
