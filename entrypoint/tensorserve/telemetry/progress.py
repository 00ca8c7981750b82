"""What does a person at the terminal see while a start runs? A bar, or plain lines without one."""

from __future__ import annotations

import os
import time
from typing import TextIO

from tensorserve.telemetry.names import Condition, Phase
from tensorserve.telemetry.state import StartState

GIB = 1024**3
# A pipe gets a line at each phase, at each tenth of the load, and after this many seconds without
# either: enough to see that a slow load goes on, too little to bury the engine's output.
_QUIET_SECONDS = 5.0
_REDRAW_SECONDS = 0.1
_BAR_WIDTH = 24
_COLUMNS = 80
_ERASE = "\r\x1b[2K"


class ProgressView:
    """Shows a start on `stream`, until the stream can no longer be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._blocks = (stream.encoding or "").lower().replace("-", "") == "utf8"
        self._gone = False
        self._drawn = ""
        self._drawn_at = 0.0
        self._shown: tuple[str | None, Phase | Condition, int] = (None, Condition.WAITING, 0)

    def update(self, state: StartState, now: float | None = None) -> None:
        """Show `state` as of `now` (monotonic seconds; the clock's, when left out)."""
        now = time.monotonic() if now is None else now
        tenth = int(state.progress * 10) if state.ranks else 0
        start, phase, shown_tenth = self._shown
        changed = (start, phase) != (state.start_id, state.phase)
        if state.phase is Condition.READY:
            if changed:
                self.clear()
                self._write(f"tensorserve: ready after {state.startup_seconds(now):.1f} s\n")
        elif isinstance(state.phase, Condition):
            self.clear()
        elif self._bar:
            self._draw(state, now)
        else:
            slow = state.phase is Phase.LOAD and now - self._drawn_at >= _QUIET_SECONDS
            stepped = state.phase is Phase.LOAD and tenth > shown_tenth
            if changed or stepped or slow:
                self._write(f"tensorserve: {describe(state, now)}\n")
                self._drawn_at = now
        self._shown = (state.start_id, state.phase, tenth)

    def clear(self) -> None:
        """Erase the bar before other output; the next update draws it again."""
        if self._drawn:
            self._write(_ERASE)
            self._drawn, self._drawn_at = "", 0.0

    def close(self) -> None:
        """Erase the bar for good."""
        self.clear()

    def _draw(self, state: StartState, now: float) -> None:
        if self._drawn and now - self._drawn_at < _REDRAW_SECONDS:
            return
        line = describe(state, now)
        if state.phase is Phase.LOAD and state.planned_bytes:
            filled = int(state.progress * _BAR_WIDTH)
            full, empty = ("█", "░") if self._blocks else ("#", "-")
            line = f"{full * filled}{empty * (_BAR_WIDTH - filled)} {line}"
        line = line[: self._columns() - 1]
        if line != self._drawn:
            self._write(_ERASE + line)
            self._drawn = line
        self._drawn_at = now

    def _columns(self) -> int:
        try:
            # A container's terminal has 0 columns until its size is set.
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def _write(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader of our output has gone; the start goes on.
            self._gone = True


def describe(state: StartState, now: float) -> str:
    """One line: the phase; while loading also percent, GiB, GiB/s and the time left."""
    if state.phase is not Phase.LOAD or not state.planned_bytes:
        return f"{state.phase} ({state.startup_seconds(now):.0f} s since the start)"
    eta = state.eta(now)
    reader = " with the reference reader" if state.by_reference else ""
    return (
        f"load{reader} {state.progress:4.0%}  "
        f"{state.arrived_bytes / GIB:.2f} of {state.planned_bytes / GIB:.2f} GiB  "
        f"{state.rate(now) / GIB:.2f} GiB/s  "
        f"ETA {'unknown' if eta is None else _clock(eta)}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
