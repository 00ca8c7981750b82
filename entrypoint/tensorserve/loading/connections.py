"""How many connections help? Starts low and grows while the rate grows."""

from __future__ import annotations

import time
from collections.abc import Callable

from tensorserve.sources.base import MOST_CONNECTIONS

# A step by that factor must bring that much, else it is taken back.
_WORTH = {2: 1.3, 4: 1.5}
# Seconds until new connections run (longer where the first byte took longer), and that a rate is
# measured over. Shorter ones take a start for a limit: the rate before a step seems too low, and
# the step worth it.
_SETTLE, _MEASURE = 0.15, 0.15
_SLOW_START = 0.5
# The first one only has to tell a step that brings something from one that does not.
_FIRST_MEASURE = 0.06
# A rate that grows no faster than that from one measurement to the next has settled.
_STEADY = 1.1
# Between looks at whether the first byte has come.
_POLL = 0.01
# A link may change: every so often one more step is tried, and at once where the rate falls that
# far below what it was (what was fetched ahead is used up).
_AGAIN = 3.0
_FALLEN = 0.6
# With less of the processors' time to spare, more connections only cost more of it.
_SPARE = 0.1
REMOTE_START, REMOTE_MOST = 16, MOST_CONNECTIONS


class Connections:
    """The number of connections that shall work now: `target`.

    `received` gives the bytes received so far. Call `step` again and again; it returns the seconds
    until it wants to be called next. Hill climbing: fourfold once, then twofold, as long as the
    rate follows and the processors have time: `spare` gives the part of their time without work
    since the call before.
    """

    def __init__(
        self,
        start: int,
        most: int,
        received: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        spare: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.target = start
        self._most = most
        self._received = received
        self._clock = clock
        self._spare = spare
        self._begun: tuple[float, int] | None = None  # when, and what had come before
        self._settle: float | None = None  # seconds; None: nothing has come yet
        self._before: tuple[int, float] | None = None  # connections and rate before the last step
        self._mark: tuple[float, int] | None = None
        self._first = True
        self._factor = 4
        self._latest: float | None = None  # the rate with as many connections as now
        self._held: tuple[float, float] | None = None  # since when no step helps, and the rate then

    def step(self) -> float:
        """Measure and decide."""
        now, received = self._clock(), self._received()
        if self._settle is None:
            return self._wait_for_first(now, received)
        if self._mark is None:
            self._mark = (now, received)
            self._spare()
            return _FIRST_MEASURE if self._first else _MEASURE
        began, had = self._mark
        self._mark = None
        rate = (received - had) / max(now - began, 1e-6)
        if self._held is not None:
            return self._hold(now, rate)
        if not rate:
            return self._settle  # no verdict
        return self._climb(now, rate)

    def _wait_for_first(self, now: float, received: int) -> float:
        """New connections take about as long to run as the first ones did."""
        if self._begun is None:
            self._begun = now, received
        began, had = self._begun
        if received == had:
            return _POLL
        self._settle = min(max(_SETTLE, 1.5 * (now - began)), _SLOW_START)
        return _POLL

    def _climb(self, now: float, rate: float) -> float:
        assert self._settle is not None
        latest, self._latest = self._latest, rate
        if self._before is not None and (latest is None or rate > _STEADY * latest):
            # Still on its way up. What comes later must not be credited to the next step.
            return _POLL
        if self._before is not None:
            before, slower = self._before
            if rate < _WORTH[self._factor] * slower:
                self.target = before
                self._before = None
                # After a step of four there is a number between.
                if self._factor == 2:
                    self._held = now, max(rate, slower)
                return self._settle
        first, self._first = self._first, False
        # The processors' first moments tell nothing: all connections begin at once.
        busy = not first and self._spare() < _SPARE
        if self.target >= self._most or busy:
            self._held = now, rate
            return self._settle
        self._before = (self.target, rate)
        self._latest = None
        self._factor = 4 if first else 2
        self.target = min(self._most, self.target * self._factor)
        return self._settle

    def _hold(self, now: float, rate: float) -> float:
        assert self._held is not None
        assert self._settle is not None
        since, held = self._held
        # Nothing at all: the consumer is what is waited for.
        fallen = 0 < rate < _FALLEN * held
        if self.target < self._most and (fallen or now - since > _AGAIN):
            self._held = None
            self._before = None
        return self._settle
