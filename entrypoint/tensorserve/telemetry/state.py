"""What is known of the last start? Phases, bytes, rate, failures and readiness.

All that shows a start reads a StartState, which fold.py makes of the event log. Nothing here reads
a clock or a file: callers of what grows with time give `now`. Times are monotonic
seconds, sizes bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tensorserve.telemetry.history import History
from tensorserve.telemetry.load import RankLoad, progress_ratio
from tensorserve.telemetry.names import Check, Condition, Phase
from tensorserve.telemetry.schema import (
    AdaptersCounted,
    CompiledCacheKnown,
    EngineProcessStarted,
    SignatureKnown,
    StartFailed,
)
from tensorserve.telemetry.timeline import Segment, Timeline


@dataclass
class StartState:
    """The last start in an event log, and counters over all starts in it."""

    start_id: str | None = None
    version: str = ""
    health_url: str | None = None
    """How the engine is probed (telemetry/probe.py)."""
    starts: int = 0
    began: float | None = None
    wall: float | None = None
    """When it began by the wall clock, seconds."""
    ready_at: float | None = None
    engine_exit: int | None = None
    exit_at: float | None = None
    failure: StartFailed | None = None
    failure_scraped: bool = False
    """Whether a scrape of /metrics has shown the failure."""
    verification: str | None = None
    """How the weights are authenticated (bundle/trust.py: MODES), once it is known."""
    signature: SignatureKnown | None = None
    """Who signed the bundle; None: no signature was asked for, or it is not known yet."""
    compiled: CompiledCacheKnown | None = None
    """What is known of the bundle's compiled code; None: it was not asked for."""
    processes: list[EngineProcessStarted] = field(default_factory=list)
    """How vLLM started its own processes."""
    checks: list[Check | None] = field(default_factory=list)
    """Those of preflight that passed; None for one of another version."""
    timeline: Timeline = field(default_factory=Timeline)
    history: History = field(default_factory=History)
    ranks: dict[int, RankLoad] = field(default_factory=dict)
    prefetch: RankLoad = field(default_factory=RankLoad)
    """What was fetched ahead of the loaders: its requests and retries."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failures by reason, over all starts."""
    last_event: float = 0.0
    last_advance: float | None = None
    """When a phase changed or bytes went through a stage."""
    last_output: float | None = None
    """When a check passed, or the start printed what it had not printed before."""
    failed_workers: dict[int, str] = field(default_factory=dict)
    """What ranks have raised after their load."""
    adapters: AdaptersCounted | None = None
    """Of adapters that are found while serving, over all starts but for what is held; None: none
    was asked for."""
    earlier_adapters: AdaptersCounted = field(default_factory=AdaptersCounted)
    """Those of the starts before the last one."""
    earlier_requests: int = 0
    earlier_retries: Counter[str] = field(default_factory=Counter)
    """Those of the starts before the last one."""

    @property
    def ready(self) -> bool:
        """Whether this start became ready, and its engine has not ended since."""
        return self.ready_at is not None and self.engine_exit is None

    @property
    def last_sign(self) -> float | None:
        """When the start was last seen to advance, in any way; None where none has begun."""
        moments = (self.began, self.last_advance, self.last_output)
        return max((m for m in moments if m is not None), default=None)

    @property
    def load_complete(self) -> bool:
        """Whether every rank that announced a load has finished it, and there is one at all."""
        return bool(self.ranks) and all(rank.done is not None for rank in self.ranks.values())

    @property
    def phase(self) -> Phase | Condition:
        """The phase that runs, or why none does."""
        if self.failure is not None:
            return Condition.FAILED
        if self.engine_exit is not None:
            return Condition.STOPPED
        if self.ready_at is not None:
            return Condition.READY
        current = self.timeline.current
        return Condition.WAITING if current is None else current.phase

    @property
    def segments(self) -> list[Segment]:
        """The time line."""
        return self.timeline.segments

    def end(self, now: float) -> float:
        """Where the time line of this start ends: ready, the engine's end, or else `now`."""
        for moment in (self.ready_at, self.exit_at):
            if moment is not None:
                return moment
        return max(now, self.last_event)

    def startup_seconds(self, now: float) -> float:
        """From the begin to ready; what has gone by so far while it is not."""
        return 0.0 if self.began is None else self.end(now) - self.began

    def phase_seconds(self, now: float) -> dict[Phase, float]:
        """Seconds of each phase reached, in order of appearance; their sum is `startup_seconds`."""
        return self.timeline.seconds(self.end(now))

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
        """Bytes that have arrived, whether they are in the model yet or not, all ranks."""
        return sum(rank.arrived for rank in self.ranks.values())

    @property
    def progress(self) -> float:
        """Arrived of planned bytes, 0 to 1, all ranks; 1 only when all are in the model."""
        if self.planned_bytes == 0:
            return 1.0 if self.load_complete else 0.0
        return progress_ratio(self.arrived_bytes, self.copied_bytes, self.planned_bytes)

    @property
    def by_reference(self) -> bool:
        """Whether tensorizer's own reader loads (TENSORSERVE_LOADER=reference)."""
        return any(load.by_reference for load in self.ranks.values())

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
        """Seconds until the load is complete; None where that is not known (a stall, an end)."""
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
        return self.earlier_requests + sum(load.counts.requests for load in loads)

    @property
    def retries(self) -> Counter[str]:
        """Requests sent again by reason, over all starts and ranks."""
        total = Counter(self.earlier_retries)
        for load in (self.prefetch, *self.ranks.values()):
            total.update(load.counts.retries)
        return total
