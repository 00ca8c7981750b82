"""What happened in a start, as a short list of notes: phases done, retries, failures, ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tensorserve.telemetry.events import Event
from tensorserve.telemetry.state import PHASES, StartState
from tensorserve.telemetry.words import duration, failed, retry_words

_MOST_NOTES = 12
_SECONDS_OF_ONE_NOTE = 10.0
"""Requests sent again for one reason within this time are one line."""
_DONE = {
    "preflight": "All checks passed",
    "artifacts": "Configuration and tokenizer are there",
    "import": "vLLM has started",
    "init": "The empty model is set up",
    "load": "The weights are in the model",
    "postprocess": "The weights are prepared",
    "warmup": "The engine is warm",
}
# The names of `preflight`'s checks. Any other could hold something of the user's.
_CHECKS = frozenset(
    {"vLLM", "device", "API port", "metrics port", "shared memory", "state directory"}
    | {"weights", "encryption", "verification", "configuration", "memory"}
)


@dataclass
class Note:
    """Something that happened at monotonic second `t`; `tone`: plain, good, warning or bad."""

    t: float
    text: str
    tone: str = "plain"
    retried: str | None = None
    count: int = 0


class Story:
    """The notes of the log's last start, oldest first; `StartState` keeps sums, not moments."""

    def __init__(self) -> None:
        self.notes: deque[Note] = deque(maxlen=_MOST_NOTES)
        self._state = StartState()
        self._checks: list[str] = []

    def apply(self, event: Event) -> None:
        """Take in one event."""
        state, moment = self._state, event["t"]
        segment = state.segments[-1] if state.segments else None
        retries, failure, ready = state.retries, state.failure, state.ready_at
        by_reference = state.reference
        state.apply(event)
        if event["event"] == "start":
            self._start(moment)
            return
        if event["event"] == "check":
            name = str(event.get("name"))
            self._checks.append(name if name in _CHECKS else "another one")
        if segment is not None and segment.end is not None and state.segments[-1] is not segment:
            self._phase_done(segment.phase, segment.end, segment.end - segment.begin)
        if state.reference and not by_reference:
            # Slower, and meant for a while: nobody should wonder why.
            self._note(Note(moment, "Tensorizer's own reader loads, as asked", "warning"))
        for reason, count in (state.retries - retries).items():
            self._retried(reason, count, moment)
        if state.ready_at is not None and ready is None:
            took = duration(state.startup_seconds(moment))
            self._note(Note(moment, f"Ready after {took}", "good"))
        if state.failure is not None and failure is None:
            self._note(Note(moment, failed(state), "bad"))
        elif event["event"] == "engine_exit" and state.failure is None:
            self._note(Note(moment, "Stopped as asked", "warning"))

    def _start(self, moment: float) -> None:
        self.notes.clear()
        self._checks.clear()
        starts = self._state.starts
        again = f"Started again, start number {starts}" if starts > 1 else "The start began"
        self._note(Note(moment, again, "warning" if starts > 1 else "plain"))

    def _phase_done(self, phase: str, moment: float, seconds: float) -> None:
        text = _DONE[phase]
        if phase == PHASES[0] and self._checks:
            text = f"{len(self._checks)} checks passed: {', '.join(self._checks)}"
        self._note(Note(moment, f"{text} ({duration(seconds)})"))

    def _retried(self, reason: str, count: int, moment: float) -> None:
        last = self.notes[-1] if self.notes else None
        if last is not None and last.retried == reason and moment - last.t <= _SECONDS_OF_ONE_NOTE:
            last.count += count
        else:
            last = Note(moment, "", "warning", retried=reason, count=count)
            self._note(last)
        requests = "1 request" if last.count == 1 else f"{last.count} requests"
        last.text = f"{requests} sent again: {retry_words(reason)}"

    def _note(self, note: Note) -> None:
        self.notes.append(note)
