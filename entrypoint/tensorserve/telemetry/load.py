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
    def ratio(self) -> float:
        """Copied of planned bytes, 0 to 1."""
        if self.planned == 0:
            return 0.0 if self.done is None else 1.0
        return min(1.0, self.copied / self.planned)

    def rate(self, now: float) -> float:
        """Bytes a second into the model: over `RATE_WINDOW` while loading, afterwards the mean.

        Until the first (often the largest) tensor is in the model, it is the rate of the fetch.
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
        gained = self.copied - base[2] if self.copied else self.bytes("fetch") - base[1]
        return gained / elapsed if elapsed > 0 else 0.0

    def mean_rate(self, end: float) -> float:
        """Bytes a second from the plan to `end`."""
        elapsed = end - self.began
        return self.copied / elapsed if elapsed > 0 else 0.0

    def _sample(self, moment: float) -> None:
        self._samples.append((moment, self.bytes("fetch"), self.copied))
        while len(self._samples) > 2 and self._samples[1][0] <= moment - 2 * RATE_WINDOW:
            self._samples.popleft()


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
