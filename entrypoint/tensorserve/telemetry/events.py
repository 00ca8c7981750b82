"""How do the processes of a start tell each other what happened? An append-only file of JSON lines.

event_codec.py says what a line holds. CLOCK_MONOTONIC is one clock for the whole system, so the
times of events compare across processes (clock_gettime(2)).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tensorserve.telemetry.event_codec import MOST_LINE_BYTES, Record, decode, encode
from tensorserve.telemetry.schema import Event

_FILE = "events.jsonl"
_PREVIOUS_FILE = "events.previous.jsonl"


def events_path(state_dir: Path) -> Path:
    """Where the event log of `state_dir` lies."""
    return state_dir / _FILE


def new_log(state_dir: Path) -> EventLog:
    """A new log in `state_dir`; the one before is kept as `events.previous.jsonl`.

    Never raises OSError: where the old log cannot be renamed, the new start is appended to it.
    """
    path = events_path(state_dir)
    log = EventLog(path)
    try:
        path.replace(state_dir / _PREVIOUS_FILE)
    except FileNotFoundError:
        pass  # the first start in this directory
    except OSError as error:
        log.report_failure(error)
    return log


class EventLog:
    """Appends events to `path` (mode 0600). Threads and processes may append to one file at once.

    A log that cannot be written does not end a start: failed writes are counted in `failed_writes`
    and reported once, on stderr.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._torn = False
        self.failed_writes = 0

    def emit(self, event: Event) -> None:
        """Append one event. Never raises OSError; values that are not JSON are written as text."""
        record = encode(event, t=time.monotonic(), wall=time.time(), pid=os.getpid())
        line = json.dumps(record, default=str).encode() + b"\n"
        with self._lock:
            if self._torn:
                line = b"\n" + line
            try:
                written = os.write(self._open(), line)
            except OSError as error:
                self.report_failure(error)
                return
            # On a disk that has just become full, a write is short.
            self._torn = written < len(line)
            if self._torn:
                self.report_failure(OSError(0, f"only {written} of {len(line)} bytes written"))

    def report_failure(self, error: OSError) -> None:
        """Count a failed write; the first one is reported on stderr."""
        self.failed_writes += 1
        if self.failed_writes > 1:
            return
        # stderr may be closed.
        with suppress(OSError, ValueError):
            print(
                f"tensorserve: warning: {self._path} cannot be written: {error.strerror}. "
                "The start goes on; metrics and `tensorserve report` will lack events.",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Close the file; a later `emit` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        # Kept open: a process that is left over from an earlier start writes into the log of that
        # start, also after `new_log` has renamed it.
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o600)
        return self._descriptor

    def __del__(self) -> None:
        self.close()


class Follower:
    """Reads a log while other processes append to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        self.damaged = 0
        """Lines skipped because they are no event: a full disk or a kill may leave such lines."""

    def poll(self) -> list[Record]:
        """The events that came since the last poll; none while there is no file yet.

        A last line without its newline is left for a later poll. Raises OSError where the file
        is there but cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                info = os.fstat(file.fileno())
                if (info.st_dev, info.st_ino) != self._file or info.st_size < self._offset:
                    self._file = (info.st_dev, info.st_ino)
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        # Of a line that is too long, enough is kept to skip it when it ends.
        self._rest = rest[: MOST_LINE_BYTES + 1]
        records = []
        for line in filter(None, lines):
            record = decode(line)
            if record is None:
                self.damaged += 1
            else:
                records.append(record)
        return records


def read_events(path: Path) -> list[Record]:
    """Every whole event of the log at `path`; empty where there is none. Raises OSError."""
    return Follower(path).poll()
