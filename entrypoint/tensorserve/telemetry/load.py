"""How far is one rank's load, and how fast does it go?

Times are monotonic seconds, sizes bytes.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensorserve.telemetry.names import REFERENCE_LOADER, Stage
from tensorserve.telemetry.schema import LoadCounts, LoadPlanned

RATE_WINDOW = 5.0
"""Seconds over which a running load's rate is taken: long enough to even out single tensors,
short enough that a stall shows."""
# The most that is shown while a byte is not in the model.
_NEARLY = 0.99


@dataclass
class RankLoad:
    """What one rank has to load, and what it has done so far."""

    planned: int = 0
    tensors: int = 0
    loader: str = "auto"
    """The value of TENSORSERVE_LOADER."""
    transport: str | None = None
    """What brings the bytes (`LoadPlanned.transport`); None where a log does not say."""
    sharing: str | None = None
    """Whether other ranks open a part of it (`LoadPlanned.sharing`), likewise."""
    opens: int = 0
    """Bytes that it opens itself."""
    pid: int | None = None
    """The process that loads: vLLM's worker."""
    began: float = 0.0
    done: float | None = None
    counts: LoadCounts = field(default_factory=LoadCounts)
    _before: LoadCounts = field(default_factory=LoadCounts)
    _latest: LoadCounts = field(default_factory=LoadCounts)
    _fresh: bool = False
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def plan(self, plan: LoadPlanned, moment: float) -> None:
        """Take a plan. A second one (a draft model's) adds to the first."""
        if self.planned == 0:
            self.began = moment
        self.planned += plan.bytes
        self.tensors += plan.tensors
        self.loader = plan.loader or self.loader
        self.transport = plan.transport or self.transport
        self.sharing = plan.sharing or self.sharing
        self.opens += plan.opens or 0
        self.done = None
        self._fresh = True
        self._sample(moment)

    def progress(self, counts: LoadCounts, moment: float) -> bool:
        """Take the latest counts; whether more bytes have gone through some stage."""
        highest = _combined(self._latest, counts, max)
        if self._fresh and highest != counts:
            # A second loader in this process counts from zero again.
            self._before, highest = _combined(self._before, self._latest, operator.add), counts
        self._fresh = False
        # Lines of one process may overtake each other, and a counter never falls.
        self._latest = highest
        before = sum(map(self.bytes, Stage))
        self.counts = _combined(self._before, self._latest, operator.add)
        self._sample(moment)
        return sum(map(self.bytes, Stage)) > before

    def bytes(self, stage: Stage) -> int:
        """Bytes that went through `stage`."""
        return self.counts.bytes(stage)

    def seconds(self, stage: Stage) -> float:
        """Thread seconds that `stage` took; stages run beside each other, on several threads."""
        return self.counts.seconds(stage)

    @property
    def by_reference(self) -> bool:
        """Whether tensorizer's own reader reads."""
        return self.loader == REFERENCE_LOADER

    @property
    def copied(self) -> int:
        """Bytes that are in the model."""
        return self.counts.copy

    @property
    def arrived(self) -> int:
        """Bytes that have arrived, whether they are in the model yet or not.

        The model takes whole tensors, in file order: over a slow link that many connections share,
        most of the file may be here before the first tensor is complete.
        """
        return min(self.planned, max(self.counts.fetch, self.copied))

    @property
    def ratio(self) -> float:
        """Arrived of planned bytes, 0 to 1; 1 only when all of them are in the model."""
        if self.planned == 0:
            return 0.0 if self.done is None else 1.0
        return progress_ratio(self.arrived, self.copied, self.planned)

    @property
    def left(self) -> int:
        """Bytes that have not arrived; when all have: those that are not in the model."""
        return max(0, self.planned - (self.arrived if self._arriving else self.copied))

    @property
    def _arriving(self) -> bool:
        return self.arrived < self.planned

    def rate(self, now: float) -> float:
        """Bytes a second that arrive: over `RATE_WINDOW` while loading, afterwards the mean.

        When all have arrived, it is the rate at which the rest goes into the model.
        """
        if self.done is not None:
            return self.mean_rate(self.done)
        if not self._samples:
            return 0.0
        base = self._samples[0]
        for sample in self._samples:
            if sample[0] <= now - RATE_WINDOW:
                base = sample
        elapsed = now - base[0]
        gained = self.arrived - base[1] if self._arriving else self.copied - base[2]
        return gained / elapsed if elapsed > 0 else 0.0

    def mean_rate(self, end: float) -> float:
        """Bytes a second from the plan to `end`."""
        elapsed = end - self.began
        return self.copied / elapsed if elapsed > 0 else 0.0

    def _sample(self, moment: float) -> None:
        self._samples.append((moment, self.arrived, self.copied))
        while len(self._samples) > 2 and self._samples[1][0] <= moment - 2 * RATE_WINDOW:
            self._samples.popleft()


def progress_ratio(arrived: int, copied: int, planned: int) -> float:
    """How far a load of `planned` bytes is, 0 to 1; 1 only when all are in the model."""
    return 1.0 if copied >= planned else min(_NEARLY, arrived / planned)


def _combined(one: LoadCounts, other: LoadCounts, take: Callable[[Any, Any], Any]) -> LoadCounts:
    """`take` of each two counts."""
    reasons = [*one.retries, *(reason for reason in other.retries if reason not in one.retries)]
    return LoadCounts(
        fetch=take(one.fetch, other.fetch),
        decrypt=take(one.decrypt, other.decrypt),
        copy=take(one.copy, other.copy),
        fetch_seconds=take(one.fetch_seconds, other.fetch_seconds),
        decrypt_seconds=take(one.decrypt_seconds, other.decrypt_seconds),
        copy_seconds=take(one.copy_seconds, other.copy_seconds),
        requests=take(one.requests, other.requests),
        retries={
            reason: take(one.retries.get(reason, 0), other.retries.get(reason, 0))
            for reason in reasons
        },
    )
