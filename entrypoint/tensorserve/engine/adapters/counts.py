"""What is counted of adapters, and when does the event log hear of it?

The log has no rotation, so the counts are written as they stand: at once when they have changed,
but not more often than every 10 s, and every minute where only hits have been added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tensorserve.telemetry.schema import AdaptersCounted, Event

_SECONDS, _SECONDS_OF_HITS = 10.0, 60.0


class AdapterCounts:
    """Counts since the API server has started."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self.loads = 0
        self.load_seconds = 0.0
        self.hits = 0
        self.failures: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self._emit = emit
        self._told = AdaptersCounted()
        self._told_at: float | None = None

    def tell(self, now: float, held: int, held_bytes: int) -> None:
        """Write an event where it is time to. `now`: monotonic seconds."""
        event = AdaptersCounted(
            loads=self.loads,
            load_seconds=round(self.load_seconds, 3),
            hits=self.hits,
            failures=dict(self.failures),
            ended=dict(self.ended),
            held=held,
            held_bytes=held_bytes,
        )
        if event == self._told:
            return
        only_hits = replace(event, hits=self._told.hits) == self._told
        wait = _SECONDS_OF_HITS if only_hits else _SECONDS
        if self._told_at is None or now - self._told_at >= wait:
            self._told, self._told_at = event, now
            self._emit(event)
