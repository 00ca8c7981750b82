"""How many connections help? Starts low and grows while the rate grows (hill climbing)."""

from __future__ import annotations

import time
from collections.abc import Callable

from tensorserve.loading.tuning import DEFAULTS


def remote_start(processors: int) -> int:
    """With how many connections a load from a remote source begins."""
    # Where a link gives all that the processors can do, more connections only take turns.
    wanted = DEFAULTS.start_connections_per_cpu * processors
    return min(DEFAULTS.most_start_connections, max(DEFAULTS.least_start_connections, wanted))


def prefetch_start(processors: int) -> int:
    """With how many connections fetching ahead begins, while vLLM's import takes one processor.

    A near server gives one connection all that a processor can take. Each further one would take
    time from the import. From a distant one the processors are idle, and the first step is wide.
    Two at least: a connection that hangs must not hold up all.
    """
    return min(remote_start(processors), max(2, processors - 1))


class Concurrency:
    """The number of connections that shall work now: `target`.

    `received` gives the bytes received so far; `idle` the part of the processors' time, 0 to 1,
    that was idle since the call before. Call `step` again and again; it returns the seconds until
    it wants to be called next. A step doubles the number, as long as the rate follows and the
    processors have time; the first step is wider where the processors are idle.
    """

    def __init__(
        self,
        start: int,
        most: int,
        received: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        idle: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.target = start
        self._most = most
        self._received = received
        self._clock = clock
        self._idle = idle
        self._begun: tuple[float, int] | None = None
        """(time of the first look, bytes received before it)."""
        self._settle: float | None = None
        """Seconds until new connections run; None: nothing has been received yet."""
        self._before: tuple[int, float] | None = None
        """(connections, rate) before the last step."""
        self._rated: tuple[float, int] | None = None
        """(time of the first call of `rate`, bytes received before it)."""
        self._measuring: tuple[float, int] | None = None
        """(time, bytes received) at the begin of a measurement."""
        self._first = True
        self._doubled = False
        self._latest: float | None = None
        """The rate with as many connections as now."""
        self._held: tuple[float, float] | None = None
        """(since when no step helps, the rate then)."""

    @property
    def after_next_step(self) -> int:
        """The most that the next step will ask for."""
        return max(DEFAULTS.first_step, 2 * self.target)

    def rate(self, received: int) -> float:
        """Bytes per second of one connection since the first call, with `received` bytes by now."""
        now = self._clock()
        if self._rated is None:
            self._rated = now, received
        began, before = self._rated
        return (received - before) / max(now - began, 1e-3) / self.target

    def limit(self, most: int) -> None:
        """From now on no more than `most`: the memory for them is wanted for something else."""
        self._most = min(self._most, most)
        self.target = min(self.target, self._most)

    def step(self) -> float:
        """Measure and decide; gives the seconds until the next call."""
        now, received = self._clock(), self._received()
        if self._settle is None:
            return self._wait_for_first(now, received)
        if self._measuring is None:
            self._measuring = (now, received)
            self._idle()
            return DEFAULTS.first_measure_seconds if self._first else DEFAULTS.measure_seconds
        began, had = self._measuring
        self._measuring = None
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
            return DEFAULTS.poll_seconds
        took = DEFAULTS.settle_factor * (now - began)
        self._settle = min(max(DEFAULTS.settle_seconds, took), DEFAULTS.most_settle_seconds)
        return DEFAULTS.poll_seconds

    def _climb(self, now: float, rate: float) -> float:
        assert self._settle is not None
        latest, self._latest = self._latest, rate
        if self._before is not None and (latest is None or rate > DEFAULTS.steady_growth * latest):
            # Still growing. What comes later must not be credited to the next step.
            return DEFAULTS.poll_seconds
        if self._before is not None:
            before, slower = self._before
            gain = DEFAULTS.step_gain if self._doubled else DEFAULTS.wide_step_gain
            if rate < gain * slower:
                self.target = min(before, self._most)
                self._before = None
                # After a wider step a number between is tried.
                if self._doubled:
                    self._held = now, max(rate, slower)
                return self._settle
        first, self._first = self._first, False
        idle = self._idle()
        if self.target >= self._most or idle < DEFAULTS.least_idle:
            self._held = now, rate
            return self._settle
        self._before = (self.target, rate)
        self._latest = None
        twice = 2 * self.target
        wide = first and idle > DEFAULTS.first_step_idle and twice < DEFAULTS.first_step
        self._doubled = not wide
        self.target = min(self._most, DEFAULTS.first_step if wide else twice)
        return self._settle

    def _hold(self, now: float, rate: float) -> float:
        assert self._held is not None
        assert self._settle is not None
        since, held = self._held
        # A rate of 0 says nothing of the link: the load waits for the consumer.
        fallen = 0 < rate < DEFAULTS.fallen_rate * held
        if self.target < self._most and (fallen or now - since > DEFAULTS.retry_step_seconds):
            self._held = None
            self._before = None
        return self._settle
