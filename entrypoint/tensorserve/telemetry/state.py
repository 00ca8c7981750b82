"""What do the events add up to? Phases, bytes, rate, failures and readiness of the current start.

Nothing here reads a clock or a file: whoever asks for something that grows with time gives `now`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tensorserve.telemetry.events import Event
from tensorserve.telemetry.load import RankLoad, label, number, progress_ratio

PHASES = ("preflight", "artifacts", "import", "init", "load", "postprocess", "warmup")
# Ends that somebody asked for: 0, SIGINT, SIGTERM.
_ASKED_FOR = frozenset({0, 130, 143})


@dataclass
class Segment:
    """A stretch of time that belongs to one phase; monotonic seconds, `end` None while it runs."""

    phase: str
    begin: float
    end: float | None = None
    presumed: bool = False
    """Begun by the end of the phase before; the log has not named it yet."""


@dataclass(frozen=True)
class Failure:
    """Why a start failed; `message` may name the user's files and stays out of HTTP answers."""

    reason: str
    exit_code: int
    message: str
    memory_limit: int | None = None  # bytes, where memory was the reason
    memory_peak: int | None = None


@dataclass
class StartState:
    """The fold of an event log: the last start in it, and counters over all starts in it."""

    start_id: str | None = None
    version: str = ""
    health_url: str | None = None
    starts: int = 0
    began: float | None = None
    wall: float | None = None
    ready_at: float | None = None
    engine_exit: int | None = None
    exit_at: float | None = None
    failure: Failure | None = None
    verification: str | None = None
    """What vouches for the weights (verification.MODES), once it is known."""
    segments: list[Segment] = field(default_factory=list)
    ranks: dict[int, RankLoad] = field(default_factory=dict)
    prefetch: RankLoad = field(default_factory=RankLoad)
    """What was fetched ahead of the loaders: its requests and retries."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failures by reason, over all starts."""
    last_event: float = 0.0
    last_advance: float | None = None
    """When a phase changed or bytes went through a stage."""
    _requests_before: int = 0
    _retries_before: Counter[str] = field(default_factory=Counter)

    def apply(self, event: Event) -> None:
        """Take in one event. Unknown events and fields are passed over."""
        self.last_event = max(self.last_event, event["t"])
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "phase":
            self._phase(event)
        elif kind in {"load_plan", "load_progress", "load_done"}:
            self._load(kind, event)
        elif kind == "prefetch_progress":
            self.prefetch.progress(event)
        elif kind == "verification":
            self.verification = label(event.get("mode"))
        elif kind == "ready":
            self._ready(event)
        elif kind == "failure":
            code = int(number(event.get("exit_code")))
            limit, peak = (int(number(event.get(name))) or None for name in ("limit", "peak"))
            message = str(event.get("message", ""))
            self._fail(Failure(label(event.get("reason")), code, message, limit, peak))
        elif kind == "engine_exit":
            self._exit(event)

    @property
    def ready(self) -> bool:
        """Whether this start became ready, and its engine has not ended since."""
        return self.ready_at is not None and self.engine_exit is None

    @property
    def load_complete(self) -> bool:
        """Whether every rank that announced a load has finished it, and there is one at all."""
        return bool(self.ranks) and all(rank.done is not None for rank in self.ranks.values())

    @property
    def phase(self) -> str:
        """The phase that runs; else `waiting` (no start yet), `ready`, `failed` or `stopped`."""
        if self.failure is not None:
            return "failed"
        if self.engine_exit is not None:
            return "stopped"
        if self.ready_at is not None:
            return "ready"
        return self.segments[-1].phase if self.segments else "waiting"

    def end(self, now: float) -> float:
        """Where the time line of this start ends: ready, the engine's end, or else `now`."""
        for moment in (self.ready_at, self.exit_at):
            if moment is not None:
                return moment
        return max(now, self.last_event)

    def startup_seconds(self, now: float) -> float:
        """From `start` to ready; what has gone by so far while it is not."""
        return 0.0 if self.began is None else self.end(now) - self.began

    def phase_seconds(self, now: float) -> dict[str, float]:
        """Seconds of each phase reached, in order of appearance; their sum is `startup_seconds`."""
        durations: dict[str, float] = {}
        for segment in self.segments:
            end = self.end(now) if segment.end is None else segment.end
            durations[segment.phase] = durations.get(segment.phase, 0.0) + end - segment.begin
        return durations

    @property
    def planned_bytes(self) -> int:
        """Bytes that all ranks will load."""
        return sum(rank.planned for rank in self.ranks.values())

    @property
    def copied_bytes(self) -> int:
        """Bytes that are in the model, all ranks."""
        return sum(rank.copied for rank in self.ranks.values())

    @property
    def arrived_bytes(self) -> int:
        """Bytes that have come, into the model or on their way there, all ranks."""
        return sum(rank.arrived for rank in self.ranks.values())

    @property
    def progress(self) -> float:
        """Arrived of planned bytes, 0 to 1, all ranks; 1 only when all are in the model."""
        if self.planned_bytes == 0:
            return 1.0 if self.load_complete else 0.0
        return progress_ratio(self.arrived_bytes, self.copied_bytes, self.planned_bytes)

    @property
    def reference(self) -> bool:
        """Whether tensorizer's own reader loads (TENSORSERVE_LOADER=reference)."""
        return any(load.loader == "reference" for load in self.ranks.values())

    def rank_rate(self, rank: int, now: float) -> float:
        """Bytes a second of one rank; 0 where the engine has ended in the middle of its load."""
        load = self.ranks[rank]
        return 0.0 if self.exit_at is not None and load.done is None else load.rate(now)

    def rate(self, now: float) -> float:
        """Bytes a second of all ranks that still load, together; after the load, its mean."""
        if self.load_complete:
            begin = min(load.began for load in self.ranks.values())
            end = max(load.done or begin for load in self.ranks.values())
            return self.copied_bytes / (end - begin) if end > begin else 0.0
        loading = [rank for rank, load in self.ranks.items() if load.done is None]
        return sum(self.rank_rate(rank, now) for rank in loading)

    def eta(self, now: float) -> float | None:
        """Seconds until the load is complete; None where nothing says (a stall, an end)."""
        if not self.ranks:
            return None
        longest = 0.0
        for rank, load in self.ranks.items():
            if load.done is None:
                rate = self.rank_rate(rank, now)
                if rate <= 0:
                    return None
                longest = max(longest, load.left / rate)
        return longest

    @property
    def requests(self) -> int:
        """Requests sent for weights, over all starts and ranks."""
        loads = [self.prefetch, *self.ranks.values()]
        return self._requests_before + sum(load.counts["requests"] for load in loads)

    @property
    def retries(self) -> Counter[str]:
        """Requests sent again by reason, over all starts and ranks."""
        total = Counter(self._retries_before)
        for load in (self.prefetch, *self.ranks.values()):
            total.update(load.retries())
        return total

    def _start(self, event: Event) -> None:
        self._requests_before, self._retries_before = self.requests, self.retries
        self.starts += 1
        # A log of another version may lack the name; starts must still differ.
        self.start_id = str(event.get("start_id") or f"start-{self.starts}")
        self.version = str(event.get("version", ""))
        url = event.get("health_url")
        self.health_url = url if isinstance(url, str) else None
        self.began = self.last_event = self.last_advance = event["t"]
        self.wall = number(event.get("w")) or None
        self.ready_at = self.engine_exit = self.exit_at = self.failure = self.verification = None
        self.ranks = {}
        self.prefetch = RankLoad()
        self.segments = [Segment(PHASES[0], event["t"], presumed=True)]

    def _phase(self, event: Event) -> None:
        phase, state = event.get("phase"), event.get("state")
        if phase not in PHASES or self.ready_at is not None or self.exit_at is not None:
            return
        if self.began is None:
            self.began = event["t"]
        current = self.segments[-1] if self.segments else None
        if state == "begin":
            self._begin(phase, current, event["t"])
        elif state == "end" and current is not None and current.phase == phase:
            # Whatever follows has begun, named or not: phases leave no gaps, so that they always
            # sum to the total. After the last phase nothing follows but `ready`.
            if phase != PHASES[-1]:
                following = PHASES[PHASES.index(phase) + 1]
                self._switch(Segment(following, event["t"], presumed=True))
        else:
            return
        self.last_advance = event["t"]

    def _begin(self, phase: str, current: Segment | None, moment: float) -> None:
        if current is not None and (current.presumed or current.phase == phase):
            current.phase, current.presumed = phase, False
            return
        self._switch(Segment(phase, moment))

    def _switch(self, following: Segment) -> None:
        if self.segments:
            # Two processes' lines may be written in another order than their times.
            following.begin = max(following.begin, self.segments[-1].begin)
            self.segments[-1].end = following.begin
        self.segments.append(following)

    def _load(self, kind: str, event: Event) -> None:
        rank = event.get("rank")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            return
        if kind == "load_plan":
            self.ranks.setdefault(rank, RankLoad()).plan(event)
        elif rank not in self.ranks:
            return
        elif kind == "load_progress":
            if not self.ranks[rank].progress(event):
                return
        else:
            self.ranks[rank].done = event["t"]
        self.last_advance = event["t"]

    def _ready(self, event: Event) -> None:
        # One that was meant for an earlier start must not make this one ready.
        if event.get("start_id", self.start_id) != self.start_id:
            return
        if self.ready_at is None and self.exit_at is None:
            self.ready_at = self.last_advance = event["t"]
            self._finish(event["t"])

    def _fail(self, failure: Failure) -> None:
        # Several processes report one failure: each rank that read the damaged file, and the parent
        # that saw them end. A start fails once, by the first cause.
        if self.failure is None:
            self.failure = failure
            self.failures[failure.reason] += 1

    def _exit(self, event: Event) -> None:
        code = event.get("code")
        self.engine_exit = code if isinstance(code, int) else 70
        self.exit_at = event["t"]
        if self.ready_at is None:
            self._finish(event["t"])
        if self.engine_exit not in _ASKED_FOR:
            self._fail(Failure("engine", self.engine_exit, _ending(self.engine_exit)))

    def _finish(self, moment: float) -> None:
        if self.segments:
            self.segments[-1].end = max(moment, self.segments[-1].begin)


def fold(events: Iterable[Event]) -> StartState:
    """The state after `events`."""
    state = StartState()
    for event in events:
        state.apply(event)
    return state


def _ending(code: int) -> str:
    if code == 137:
        return "The engine was killed (137): out of memory, or stopped while loading."
    return f"The engine ended by itself with code {code}; its own output says why."
