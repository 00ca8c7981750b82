"""What do the events of a log add up to? The only place that turns events into a state.

Nothing here reads a clock or a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from tensorserve.telemetry.event_codec import Record
from tensorserve.telemetry.history import (
    BecameReady,
    Failed,
    History,
    PhaseDone,
    ReferenceReads,
    Retried,
    StartBegun,
    Stopped,
)
from tensorserve.telemetry.load import RankLoad
from tensorserve.telemetry.names import ENGINE_ENDED, PHASES, Edge, Phase
from tensorserve.telemetry.schema import (
    AdaptersCounted,
    CheckPassed,
    CompiledCacheKnown,
    EngineExited,
    EngineProcessStarted,
    EngineReady,
    FailureScraped,
    LoadCounts,
    LoadDone,
    LoadPlanned,
    LoadProgressed,
    OutputAdvanced,
    PhaseChanged,
    PrefetchProgressed,
    SignatureKnown,
    StartBegan,
    StartFailed,
    VerificationKnown,
    WorkerFailed,
)
from tensorserve.telemetry.state import StartState
from tensorserve.telemetry.timeline import Timeline

# Exit codes of a requested stop: 0, SIGINT, SIGTERM.
_ASKED_FOR = frozenset({0, 130, 143})
_KILLED = 137
_MOST_PROCESSES = 1024


def fold(records: Iterable[Record]) -> StartState:
    """The state after `records`."""
    state = StartState()
    for record in records:
        apply(state, record)
    return state


def apply(state: StartState, record: Record) -> None:
    """Take one event into `state`. An `Unknown` one changes nothing but `last_event`."""
    moment, event = record.t, record.event
    state.last_event = max(state.last_event, moment)
    match event:
        case StartBegan():
            _start(state, event, record)
        case CheckPassed():
            state.checks.append(event.name)
            state.last_output = moment
        case VerificationKnown():
            state.verification = event.mode
        case SignatureKnown():
            state.signature = event
        case CompiledCacheKnown():
            state.compiled = event
        case PhaseChanged():
            _phase(state, event, moment)
        case LoadPlanned():
            _plan(state, event, record)
        case LoadProgressed():
            _progress(state, event, moment)
        case LoadDone():
            if event.rank in state.ranks:
                state.ranks[event.rank].done = state.last_advance = moment
        case PrefetchProgressed():
            counts = LoadCounts(requests=event.requests, retries=event.retries)
            _count(state, state.prefetch, counts, moment)
        case OutputAdvanced():
            state.last_output = moment
        case WorkerFailed():
            state.failed_workers.setdefault(event.rank, event.error)
        case EngineProcessStarted():
            if len(state.processes) < _MOST_PROCESSES:
                state.processes.append(event)
        case EngineReady():
            _ready(state, event, moment)
        case AdaptersCounted():
            state.adapters = _sum(state.earlier_adapters, event)
        case StartFailed():
            _fail(state, event, moment)
        case EngineExited():
            _exit(state, event, moment)
        case FailureScraped():
            state.failure_scraped = True


def _start(state: StartState, event: StartBegan, record: Record) -> None:
    state.earlier_requests, state.earlier_retries = state.requests, state.retries
    if state.adapters is not None:
        # What was held went with its process.
        state.adapters = replace(state.adapters, held=0, held_bytes=0)
        state.earlier_adapters = state.adapters
    state.starts += 1
    # A log of another version may lack the identifier; starts must still differ.
    state.start_id = event.start_id or f"start-{state.starts}"
    state.version, state.health_url = event.version, event.health_url
    state.began = state.last_event = state.last_advance = record.t
    state.wall = record.wall
    state.ready_at = state.engine_exit = state.exit_at = state.failure = state.verification = None
    state.failure_scraped, state.last_output, state.failed_workers = False, None, {}
    state.compiled, state.signature, state.processes = None, None, []
    state.checks, state.ranks, state.prefetch = [], {}, RankLoad()
    state.timeline, state.history = Timeline(), History()
    state.timeline.presume(PHASES[0], record.t)
    state.history.add(StartBegun(record.t, state.starts))


def _phase(state: StartState, event: PhaseChanged, moment: float) -> None:
    if state.ready_at is not None or state.exit_at is not None:
        return
    before = state.timeline.current
    if event.state is Edge.BEGIN:
        state.timeline.begin(event.phase, moment)
    elif not state.timeline.end(event.phase, moment):
        return
    if state.began is None:
        state.began = moment
    state.last_advance = moment
    if before is not None and before is not state.timeline.current and before.end is not None:
        checks = tuple(state.checks) if before.phase is Phase.PREFLIGHT else ()
        seconds = before.end - before.begin
        state.history.add(PhaseDone(before.end, before.phase, seconds, checks))


def _plan(state: StartState, event: LoadPlanned, record: Record) -> None:
    before, moment = state.by_reference, record.t
    load = state.ranks.setdefault(event.rank, RankLoad())
    load.plan(event, moment)
    load.pid = record.pid
    state.last_advance = moment
    if state.by_reference and not before:
        state.history.add(ReferenceReads(moment))


def _progress(state: StartState, event: LoadProgressed, moment: float) -> None:
    load = state.ranks.get(event.rank)
    if load is not None and _count(state, load, event.counts, moment):
        state.last_advance = moment


def _count(state: StartState, load: RankLoad, counts: LoadCounts, moment: float) -> bool:
    """Take in the latest counts of `load`; whether more bytes went through a stage."""
    before = load.counts.retries
    advanced = load.progress(counts, moment)
    for reason, count in load.counts.retries.items():
        if (more := count - before.get(reason, 0)) > 0:
            state.history.add(Retried(moment, reason, more))
    return advanced


def _ready(state: StartState, event: EngineReady, moment: float) -> None:
    # The ready event of an earlier start does not make this one ready.
    if event.start_id is not None and event.start_id != state.start_id:
        return
    if state.ready_at is None and state.exit_at is None:
        state.ready_at = state.last_advance = moment
        state.timeline.finish(moment)
        state.history.add(BecameReady(moment, state.startup_seconds(moment)))


def _sum(earlier: AdaptersCounted, now: AdaptersCounted) -> AdaptersCounted:
    return replace(
        now,
        loads=earlier.loads + now.loads,
        load_seconds=earlier.load_seconds + now.load_seconds,
        hits=earlier.hits + now.hits,
        failures=Counter(earlier.failures) + Counter(now.failures),
        ended=Counter(earlier.ended) + Counter(now.ended),
    )


def _fail(state: StartState, failure: StartFailed, moment: float) -> None:
    # Several processes report one failure: each rank that read the damaged file, and their parent.
    # A start fails once, for the first reason reported.
    if state.failure is None:
        state.failure = failure
        state.failures[failure.reason] += 1
        state.history.add(Failed(moment, failure.reason, failure.exit_code))


def _exit(state: StartState, event: EngineExited, moment: float) -> None:
    state.engine_exit, state.exit_at = event.code, moment
    if state.ready_at is None:
        state.timeline.finish(moment)
    if event.code not in _ASKED_FOR:
        _fail(state, StartFailed(ENGINE_ENDED, event.code, _ending(event.code)), moment)
    elif state.failure is None:
        state.history.add(Stopped(moment))


def _ending(code: int) -> str:
    if code == _KILLED:
        return "The engine was killed (137): out of memory, or stopped while loading."
    return f"The engine ended by itself with code {code}; its output says why."
