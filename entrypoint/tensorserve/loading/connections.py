"""How many connections help? Starts low and grows while the rate grows."""

from __future__ import annotations

import time
from collections.abc import Callable

from tensorserve.sources.base import MOST_CONNECTIONS

# A step by two, or by more, must bring that much, else it is taken back.
_WORTH, _WORTH_WIDE = 1.3, 1.5
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
# Where a link gives all that the processors can do, more than two connections for each of them only
# take turns: an encrypted load over HTTP took half as long again with 16 on two.
_START_EACH = 2
_LEAST_START, _MOST_START = 4, 16
# The first step goes so far where the processors are idle: the link is slow, or wants many.
_FIRST_STEP, _IDLE = 64, 0.5
REMOTE_MOST = MOST_CONNECTIONS


def remote_start(processors: int) -> int:
    """With how many connections a load over a network begins."""
    return min(_MOST_START, max(_LEAST_START, _START_EACH * processors))


class Connections:
    """The number of connections that shall work now: `target`.

    `received` gives the bytes received so far. Call `step` again and again; it returns the seconds
    until it wants to be called next. Hill climbing, as long as the rate follows and the processors
    have time: `spare` gives the part of their time without work since the call before. A step
    doubles; the first one is wide where the processors are idle.
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
        self._doubled = False
        self._latest: float | None = None  # the rate with as many connections as now
        self._held: tuple[float, float] | None = None  # since when no step helps, and the rate then

    @property
    def after_next_step(self) -> int:
        """No more than that will be asked for by the next step."""
        return max(_FIRST_STEP, 2 * self.target)

    def limit(self, most: int) -> None:
        """From now on no more than `most`: the memory for them is wanted for something else."""
        self._most = min(self._most, most)
        self.target = min(self.target, self._most)

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
            if rate < (_WORTH if self._doubled else _WORTH_WIDE) * slower:
                self.target = min(before, self._most)
                self._before = None
                # After a wider step there is a number between.
                if self._doubled:
                    self._held = now, max(rate, slower)
                return self._settle
        first, self._first = self._first, False
        spare = self._spare()
        if self.target >= self._most or spare < _SPARE:
            self._held = now, rate
            return self._settle
        self._before = (self.target, rate)
        self._latest = None
        twice = 2 * self.target
        self._doubled = not (first and spare > _IDLE and twice < _FIRST_STEP)
        self.target = min(self._most, twice if self._doubled else _FIRST_STEP)
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
