"""Does a start still print something new? What it prints again and again is no advance.

While one of vLLM's processes waits for another, it says so every 60 s, whether that one compiles or
will never answer (distributed/device_communicators/shm_broadcast.py:109, 0.32.0).
"""

from __future__ import annotations

import re

from tensorserve.telemetry.events import EventLog
from tensorserve.telemetry.schema import OutputAdvanced

SECONDS_BETWEEN_EVENTS = 1.0
_MOST_KNOWN = 4096
_MOST_PENDING = 4096  # bytes of a line that has not ended
_LINE_END = re.compile(rb"[\r\n]+")  # a progress bar goes back with \r
# Numbers are times, process numbers and durations; n/m is how far a progress bar or a build is.
_NUMBER = re.compile(rb"\d+/\d+|\d+")


class NewLines:
    """Finds the lines of one stream that differ from all before, apart from their numbers."""

    def __init__(self) -> None:
        self._known: dict[int, None] = {}
        self._pending = b""

    def feed(self, data: bytes) -> bool:
        """Whether `data` ends a line that is new."""
        *lines, rest = _LINE_END.split(self._pending + data)
        self._pending = rest[:_MOST_PENDING]
        new = [line for line in map(_form, lines) if line.strip() and self._is_new(line)]
        return bool(new)

    def _is_new(self, line: bytes) -> bool:
        key = hash(line)
        if key in self._known:
            return False
        self._known[key] = None
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return True


class OutputWatch:
    """Writes into the event log that a start has printed something new, not too often."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._streams: dict[int, NewLines] = {}
        self._untold = False
        self._next = 0.0

    def take(self, stream: int, data: bytes) -> None:
        """`data` came from the stream of this descriptor."""
        if self._streams.setdefault(stream, NewLines()).feed(data):
            self._untold = True

    def tell(self, now: float) -> None:
        """Log what was taken, at most once in SECONDS_BETWEEN_EVENTS. `now`: monotonic seconds."""
        if self._untold and now >= self._next:
            self._log.emit(OutputAdvanced())
            self._untold, self._next = False, now + SECONDS_BETWEEN_EVENTS


def _form(line: bytes) -> bytes:
    return _NUMBER.sub(lambda found: found[0] if b"/" in found[0] else b"0", line)
