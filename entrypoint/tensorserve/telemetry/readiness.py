"""Is the engine ready? Follows the event log, asks the engine's /health, announces `ready` once."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tensorserve.telemetry import probe
from tensorserve.telemetry.compiled_keys import compiled_keys
from tensorserve.telemetry.events import EventLog, events_path
from tensorserve.telemetry.following import StartFollower
from tensorserve.telemetry.names import BROUGHT, KEPT, PHASES, UNUSED, Edge
from tensorserve.telemetry.schema import EngineReady, FailureScraped, PhaseChanged
from tensorserve.telemetry.state import StartState

SECONDS_BETWEEN_PROBES_STARTING = 0.25
SECONDS_BETWEEN_PROBES_READY = 5.0


@dataclass(frozen=True)
class Status:
    """A start at one moment. `now`: monotonic seconds; `healthy`: the probe was answered."""

    state: StartState
    healthy: bool
    now: float

    @property
    def ready(self) -> bool:
        """Whether requests may be sent to the engine."""
        return self.waiting_for is None

    @property
    def waiting_for(self) -> str | None:
        """Why the engine is not ready, without the user's data; None when it is ready."""
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

    def __init__(self, state_dir: Path, answers: Callable[[str], bool] = probe.answers) -> None:
        path = events_path(state_dir)
        self._follower = StartFollower(path)
        self._log = EventLog(path)
        self._answers = answers
        self._lock = threading.Lock()
        self._healthy: str | None = None
        self._warned = False

    def look(self) -> Status:
        """The start as the log says it now. Raises OSError where the log cannot be read."""
        with self._lock:
            return self._look()

    def step(self) -> float:
        """Probe the engine once its weights are loaded; seconds to wait until the next step."""
        state = self.look().state
        answered = (
            state.load_complete
            and state.failure is None
            and state.engine_exit is None
            and state.health_url is not None
            and self._answers(state.health_url)
        )
        with self._lock:
            self._healthy = state.start_id if answered else None
            status = self._look()
            # The log is read again: the start that was asked about may have ended meanwhile, and an
            # earlier exporter may have announced it.
            if status.ready and status.state.ready_at is None:
                self._log.emit(PhaseChanged(PHASES[-1], Edge.END))
                self._log.emit(EngineReady(status.state.start_id))
                self._tell_of_unused(status.state)
            return SECONDS_BETWEEN_PROBES_READY if status.ready else SECONDS_BETWEEN_PROBES_STARTING

    def _tell_of_unused(self, state: StartState) -> None:
        """Log where vLLM has compiled although the bundle's code was there: it has another key."""
        compiled = state.compiled
        if compiled is not None and compiled.result in {BROUGHT, KEPT}:
            keys = len(compiled_keys(Path(compiled.folder)))
            if keys > compiled.keys:
                self._log.emit(replace(compiled, result=UNUSED, keys=keys))

    def failure_was_scraped(self) -> None:
        """A scrape has shown that this start failed. Logged once: `linger` waits for it."""
        with self._lock:
            state = self._follower.poll()
            # A new start may have begun since the scrape.
            if state.failure is not None and not state.failure_scraped:
                self._log.emit(FailureScraped())

    def _look(self) -> Status:
        state = self._follower.poll()
        if self._follower.damaged and not self._warned:
            self._warned = True
            print(
                "tensorserve: warning: the event log has damaged lines; they are skipped.",
                file=sys.stderr,
                flush=True,
            )
        healthy = self._healthy is not None and self._healthy == state.start_id
        return Status(copy.deepcopy(state), healthy, time.monotonic())
