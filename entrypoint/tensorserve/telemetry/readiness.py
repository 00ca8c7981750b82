"""Is the engine ready? Follows the event log, asks the engine's /health, announces `ready` once."""

from __future__ import annotations

import copy
import http.client
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tensorserve.telemetry.events import EventLog, Follower, events_path
from tensorserve.telemetry.state import PHASES, StartState

PROBE_TIMEOUT = 2.0
"""Seconds that /health may take; a busy engine answers in milliseconds."""
SECONDS_BETWEEN_PROBES_STARTING = 0.25
SECONDS_BETWEEN_PROBES_READY = 5.0


@dataclass(frozen=True)
class Status:
    """A start as seen at one moment. `now` is monotonic seconds; `healthy`: /health answers 200."""

    state: StartState
    healthy: bool
    now: float

    @property
    def ready(self) -> bool:
        """Whether requests may be sent to the engine."""
        return self.waiting_for is None

    @property
    def waiting_for(self) -> str | None:
        """Why the engine is not ready, in words without the user's data; None when it is."""
        state = self.state
        if state.began is None:
            return "no start has been recorded yet"
        if state.failure is not None:
            return f"the start failed: {state.failure.reason} (exit code {state.failure.exit_code})"
        if state.engine_exit is not None:
            return f"the engine ended with code {state.engine_exit}"
        if not state.ranks:
            return f"no rank has begun to load yet (phase {state.phase})"
        loading = sorted(rank for rank, load in state.ranks.items() if load.done is None)
        if loading:
            ranks = ", ".join(str(rank) for rank in loading)
            return f"still loading: rank {ranks}"
        if not self.healthy:
            return "the engine's /health does not answer 200"
        return None


class Watcher:
    """Keeps the state of the start in `state_dir` up to date. Thread-safe."""

    def __init__(
        self, state_dir: Path, probe: Callable[[str], bool] = lambda url: answers(url)
    ) -> None:
        path = events_path(state_dir)
        self._follower = Follower(path)
        self._log = EventLog(path)
        self._probe = probe
        self._lock = threading.Lock()
        self._state = StartState()
        self._healthy: str | None = None
        self._warned = False
        self._told_failure_of: str | None = None

    def look(self) -> Status:
        """The start now, by the log as it stands. Raises OSError where the log cannot be read."""
        with self._lock:
            return self._look()

    def step(self) -> float:
        """Ask the engine, where its answer matters; seconds to wait until the next step."""
        state = self.look().state
        answered = (
            state.load_complete
            and state.failure is None
            and state.engine_exit is None
            and state.health_url is not None
            and self._probe(state.health_url)
        )
        with self._lock:
            self._healthy = state.start_id if answered else None
            status = self._look()
            # Looked at again: the start that was asked about may have ended meanwhile, and an
            # exporter before this one may have announced it.
            if status.ready and status.state.ready_at is None:
                self._log.emit("phase", phase=PHASES[-1], state="end")
                self._log.emit("ready", start_id=status.state.start_id)
            return SECONDS_BETWEEN_PROBES_READY if status.ready else SECONDS_BETWEEN_PROBES_STARTING

    def failure_was_scraped(self) -> None:
        """A scrape has shown that this start failed; said once, to whoever waits for that."""
        with self._lock:
            if self._told_failure_of != self._state.start_id:
                self._told_failure_of = self._state.start_id
                self._log.emit("failure_scraped")

    def _look(self) -> Status:
        for event in self._follower.poll():
            self._state.apply(event)
        if self._follower.damaged and not self._warned:
            self._warned = True
            print(
                "tensorserve: warning: the event log has damaged lines; they are skipped.",
                file=sys.stderr,
                flush=True,
            )
        healthy = self._healthy is not None and self._healthy == self._state.start_id
        return Status(copy.deepcopy(self._state), healthy, time.monotonic())


def answers(url: str) -> bool:
    """Whether an HTTP GET of `url` is answered by 200 within `PROBE_TIMEOUT` seconds.

    http.client instead of urllib: it knows no proxies, no redirects and no `file:`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        # Our own engine on loopback, with whatever certificate the user gave it for the outside:
        # the name cannot match, and nothing is sent but the question.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=PROBE_TIMEOUT, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=PROBE_TIMEOUT)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False  # not up yet, or not any more: that is the answer
    finally:
        connection.close()
