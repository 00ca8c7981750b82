"""What does the list of a start's events on the start page say?"""

from __future__ import annotations

from dataclasses import dataclass

from tensorserve.telemetry.history import (
    BecameReady,
    Fact,
    Failed,
    PhaseDone,
    ReferenceReads,
    Retried,
    StartBegun,
    Stopped,
)
from tensorserve.telemetry.names import PHASE_WORDS, Check
from tensorserve.telemetry.state import StartState
from tensorserve.telemetry.wording import duration, failed, retry_words


@dataclass(frozen=True)
class Note:
    """What happened at monotonic second `t`; `tone`: plain, good, warning or bad."""

    t: float
    text: str
    tone: str = "plain"


def notes_of(state: StartState) -> list[Note]:
    """The notes of the last start, oldest first."""
    return [_note(fact) for fact in state.history.facts]


def _note(fact: Fact) -> Note:
    match fact:
        case StartBegun():
            if fact.number == 1:
                return Note(fact.t, "The start began")
            return Note(fact.t, f"Started again, start number {fact.number}", "warning")
        case PhaseDone():
            return Note(fact.t, f"{_done(fact)} ({duration(fact.seconds)})")
        case ReferenceReads():
            # It is slower: the reader of the page should know the reason.
            return Note(
                fact.t, "Tensorizer's own reader loads the weights, as configured", "warning"
            )
        case Retried():
            requests = "1 request" if fact.count == 1 else f"{fact.count} requests"
            return Note(fact.t, f"{requests} sent again: {retry_words(fact.reason)}", "warning")
        case BecameReady():
            return Note(fact.t, f"Ready after {duration(fact.seconds)}", "good")
        case Failed():
            return Note(fact.t, failed(fact.reason, fact.exit_code), "bad")
        case Stopped():
            return Note(fact.t, "Stopped on request", "warning")


def _done(fact: PhaseDone) -> str:
    if not fact.checks:
        return PHASE_WORDS[fact.phase].done
    count = "1 check" if len(fact.checks) == 1 else f"{len(fact.checks)} checks"
    return f"{count} passed: {', '.join(map(_check, fact.checks))}"


def _check(name: Check | None) -> str:
    """The name of an unknown check may hold data of the user, and is not shown."""
    return "another one" if name is None else name.value
