"""Which moments of a start does the start page list? Facts; event_notes.py has the words.

Oldest first. The list is bounded, as a start may serve for months. Times are monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tensorserve.telemetry.names import Check, Phase

MOST_FACTS = 12
_SECONDS_OF_A_BURST = 10.0
"""Retries for one reason within this time are one fact."""


@dataclass(frozen=True)
class StartBegun:
    """A start began: the `number`th in the log, from 1."""

    t: float
    number: int


@dataclass(frozen=True)
class PhaseDone:
    """`phase` took `seconds`. `checks`: those that passed, for preflight; None: an unknown one."""

    t: float
    phase: Phase
    seconds: float
    checks: tuple[Check | None, ...] = ()


@dataclass(frozen=True)
class ReferenceReads:
    """Tensorizer's own reader loads: TENSORSERVE_LOADER=reference."""

    t: float


@dataclass(frozen=True)
class Retried:
    """`count` requests were sent again for `reason`, the first of them at `t`."""

    t: float
    reason: str
    count: int


@dataclass(frozen=True)
class BecameReady:
    """The start became ready, `seconds` after it began."""

    t: float
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The start, or its engine, failed."""

    t: float
    reason: str
    exit_code: int


@dataclass(frozen=True)
class Stopped:
    """The engine was asked to end, and did."""

    t: float


Fact = StartBegun | PhaseDone | ReferenceReads | Retried | BecameReady | Failed | Stopped


@dataclass
class History:
    """The last facts of one start."""

    facts: deque[Fact] = field(default_factory=lambda: deque(maxlen=MOST_FACTS))

    def add(self, fact: Fact) -> None:
        """One more fact. Retries for one reason that follow each other closely become one."""
        last = self.facts[-1] if self.facts else None
        if (
            isinstance(fact, Retried)
            and isinstance(last, Retried)
            and last.reason == fact.reason
            and fact.t - last.t <= _SECONDS_OF_A_BURST
        ):
            self.facts[-1] = Retried(last.t, last.reason, last.count + fact.count)
        else:
            self.facts.append(fact)
