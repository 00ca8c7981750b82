"""How far is one rank's load, and how fast does it go?"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from tensorserve.telemetry.events import Event

STAGES = ("fetch", "decrypt", "copy")
RATE_WINDOW = 5.0
"""Seconds over which a running load's rate is taken: long enough to even out single tensors,
short enough that a stall shows."""
# All has arrived, and is not in the model yet.
_NEARLY = 0.99


def number(value: object) -> float:
    """`value` where it is a finite number that is not negative, else 0: a log may be damaged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if math.isfinite(value) and value >= 0 else 0.0


def label(value: object) -> str:
    """`value` if it is a short name of our own making, else `other`: labels take no user data."""
    if isinstance(value, str) and 0 < len(value) <= 40 and value.isascii():
        plain = value.replace("_", "")
        if plain.isalnum() and plain == plain.lower():
            return value
    return "other"


@dataclass
class RankLoad:
    """One rank: what it planned, and what it has done so far. Bytes, seconds, monotonic times."""

    planned: int = 0
    tensors: int = 0
    loader: str = "auto"
    """Who reads: the value of TENSORSERVE_LOADER."""
    began: float = 0.0
    done: float | None = None
    counts: Counter[str] = field(default_factory=Counter)
    """Cumulative: `fetch`, `decrypt`, `copy` (bytes), `*_seconds`, `requests`, `retries.REASON`."""
    _before: Counter[str] = field(default_factory=Counter)
    _latest: Counter[str] = field(default_factory=Counter)
    _fresh: bool = False
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def plan(self, event: Event) -> None:
        """Take a `load_plan`. A second one (a draft model's) adds to the first."""
        if self.planned == 0:
            self.began = event["t"]
        self.planned += int(number(event.get("bytes")))
        self.tensors += int(number(event.get("tensors")))
        self.loader = label(event.get("loader", self.loader))
        self.done = None
        self._fresh = True
        self._sample(event["t"])

    def progress(self, event: Event) -> bool:
        """Take a `load_progress`; whether more bytes have gone through some stage."""
        counts = _counts(event)
        if self._fresh and any(counts[name] < self._latest[name] for name in self._latest):
            # A second loader in this process counts from zero again.
            self._before += self._latest
            self._latest = Counter()
        self._fresh = False
        # Lines of one process may overtake each other, and a counter never falls.
        self._latest |= counts
        before = sum(self.bytes(stage) for stage in STAGES)
        self.counts = self._before + self._latest
        self._sample(event["t"])
        return sum(self.bytes(stage) for stage in STAGES) > before

    def bytes(self, stage: str) -> int:
        """Bytes that went through `stage`."""
        return int(self.counts[stage])

    def seconds(self, stage: str) -> float:
        """Thread seconds that `stage` took; stages run beside each other, on several threads."""
        return float(self.counts[f"{stage}_seconds"])

    def retries(self) -> dict[str, int]:
        """Requests sent again, by reason."""
        return {
            name.removeprefix("retries."): int(count)
            for name, count in self.counts.items()
            if name.startswith("retries.")
        }

    @property
    def copied(self) -> int:
        """Bytes that are in the model."""
        return self.bytes("copy")

    @property
    def arrived(self) -> int:
        """Bytes that have come, into the model or on their way there.

        The model takes whole tensors, in file order: over a slow link that many connections share,
        most of the file may be here before the first tensor is complete.
        """
        return min(self.planned, max(self.bytes("fetch"), self.copied))

    @property
    def ratio(self) -> float:
        """Arrived of planned bytes, 0 to 1; 1 only when all of them are in the model."""
        if self.planned == 0:
            return 0.0 if self.done is None else 1.0
        return progress_ratio(self.arrived, self.copied, self.planned)

    @property
    def left(self) -> int:
        """Bytes that are to come, or when all have: to go into the model."""
        return max(0, self.planned - (self.arrived if self._coming else self.copied))

    @property
    def _coming(self) -> bool:
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
        gained = self.arrived - base[1] if self._coming else self.copied - base[2]
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


def _counts(event: Event) -> Counter[str]:
    counts: Counter[str] = Counter()
    for stage in STAGES:
        counts[stage] = int(number(event.get(stage)))
        # typeshed knows Counter with whole numbers only; fractions add just as well.
        counts[f"{stage}_seconds"] = number(event.get(f"{stage}_seconds"))  # type: ignore[assignment]
    counts["requests"] = int(number(event.get("requests")))
    retries = event.get("retries")
    if isinstance(retries, dict):
        for reason, count in retries.items():
            counts[f"retries.{label(reason)}"] += int(number(count))
    return counts
