"""Which events are there, and which fields has each? One frozen dataclass for each event.

A field stands on the log under its own name; those of a dataclass within an event stand beside it.
event_values.py says what a field may hold, event_codec.py how an event is written and read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from tensorserve.errors import TensorserveError
from tensorserve.telemetry.event_values import (
    Bytes,
    Count,
    EdgeName,
    ExitCode,
    KnownCheck,
    Label,
    OptionalBytes,
    OptionalIdentifier,
    OptionalLabel,
    OptionalText,
    PhaseName,
    Rank,
    Retries,
    Seconds,
    Text,
)
from tensorserve.telemetry.names import Stage


class Event:
    """Base of all events. `event` is the name on the log."""

    event: ClassVar[str]


@dataclass(frozen=True)
class StartBegan(Event):
    """`tensorserve up` begins a start. `attempt` counts from 0; ports are TCP ports.

    `health_url`: how the engine is probed (telemetry/probe.py).
    """

    event: ClassVar[str] = "start"
    start_id: OptionalText
    version: Text
    attempt: Count
    health_url: OptionalText
    port: Count
    metrics_port: Count


@dataclass(frozen=True)
class CheckPassed(Event):
    """A check of preflight holds. `name` is None for a check of another version."""

    event: ClassVar[str] = "check"
    name: KnownCheck
    found: Text


@dataclass(frozen=True)
class VerificationKnown(Event):
    """It is known how the weights are authenticated: one of bundle/trust.py's MODES."""

    event: ClassVar[str] = "verification"
    mode: Label


@dataclass(frozen=True)
class SignatureKnown(Event):
    """The bundle's signature fits: of a `key` or a `certificate`, by its SHA-256 in hex."""

    event: ClassVar[str] = "signature"
    kind: Label
    fingerprint: Text


@dataclass(frozen=True)
class CompiledCacheKnown(Event):
    """Whether the engine takes compiled code from the bundle, and for which fingerprint.

    `result`: `brought`, `kept` (an earlier start had brought it), `absent`, `no_place`, `compiling`
    (under `precompile`); `unused`, when the engine is ready and has compiled all the same.
    `folder`: vLLM's caches, with `keys` compiled models in them (telemetry/compiled_keys.py).
    """

    event: ClassVar[str] = "compiled_cache"
    result: Label
    fingerprint: Text
    folder: Text = ""
    keys: Count = 0


@dataclass(frozen=True)
class PhaseChanged(Event):
    """A phase begins or ends."""

    event: ClassVar[str] = "phase"
    phase: PhaseName
    state: EdgeName


@dataclass(frozen=True)
class LoadPlanned(Event):
    """A rank knows what it will load: `bytes` in `tensors` tensors.

    `loader`: the value of TENSORSERVE_LOADER; `transport`: what brings the bytes (`file`,
    `libcurl`, `urllib3`); `sharing`: whether it shares the load with other ranks, or why not
    (names.Sharing); `opens`: bytes that it fetches and opens itself. None in a log of a version
    that did not write it.
    """

    event: ClassVar[str] = "load_plan"
    rank: Rank
    bytes: Bytes
    tensors: Count
    loader: OptionalLabel
    transport: OptionalLabel = None
    sharing: OptionalLabel = None
    opens: OptionalBytes = None


@dataclass(frozen=True)
class LoadCounts:
    """What a load has done so far, cumulative.

    Bytes that went through each stage; thread seconds that the stage took, summed over its threads;
    requests sent; requests sent again, by reason.
    """

    fetch: Bytes = 0
    decrypt: Bytes = 0
    copy: Bytes = 0
    fetch_seconds: Seconds = 0.0
    decrypt_seconds: Seconds = 0.0
    copy_seconds: Seconds = 0.0
    requests: Count = 0
    retries: Retries = field(default_factory=dict)

    def bytes(self, stage: Stage) -> int:
        """Bytes that went through `stage`."""
        return {
            Stage.FETCH: self.fetch,
            Stage.DECRYPT: self.decrypt,
            Stage.COPY: self.copy,
        }[stage]

    def seconds(self, stage: Stage) -> float:
        """Thread seconds that `stage` took."""
        return {
            Stage.FETCH: self.fetch_seconds,
            Stage.DECRYPT: self.decrypt_seconds,
            Stage.COPY: self.copy_seconds,
        }[stage]


@dataclass(frozen=True)
class LoadProgressed(Event):
    """How far a rank's load is."""

    event: ClassVar[str] = "load_progress"
    rank: Rank
    counts: LoadCounts


@dataclass(frozen=True)
class LoadDone(Event):
    """All weights of a rank are in its model."""

    event: ClassVar[str] = "load_done"
    rank: Rank


@dataclass(frozen=True)
class PrefetchProgressed(Event):
    """How far the prefetch process is, cumulative: `bytes` received; requests as in LoadCounts."""

    event: ClassVar[str] = "prefetch_progress"
    bytes: Bytes
    requests: Count
    retries: Retries


@dataclass(frozen=True)
class OutputAdvanced(Event):
    """The start has printed something that it had not printed before (telemetry/output.py)."""

    event: ClassVar[str] = "output"


@dataclass(frozen=True)
class WorkerFailed(Event):
    """A worker has raised `error` in what vLLM asked it for after the load.

    vLLM ends then, unless another worker waits for this one (engine/worker_errors.py).
    """

    event: ClassVar[str] = "worker_failed"
    rank: Rank
    error: Text


@dataclass(frozen=True)
class EngineProcessStarted(Event):
    """vLLM starts a `process` of its own; None: all of them. `way`: fork, or spawn.

    `reason`: why it is not forked from the process that has imported vLLM.
    """

    event: ClassVar[str] = "engine_process"
    process: OptionalText
    way: Label
    reason: OptionalText


@dataclass(frozen=True)
class EngineReady(Event):
    """All weights are loaded and the engine answers, in the start of this identifier."""

    event: ClassVar[str] = "ready"
    start_id: OptionalIdentifier


@dataclass(frozen=True)
class AdaptersCounted(Event):
    """What the API server knows of adapters that are found while serving, cumulative but for what
    it holds.

    `loads` took `load_seconds` together. `hits`: requests for one that was loaded already.
    `failures` and `ended`: how many, by reason (docs/metrics.md).
    """

    event: ClassVar[str] = "adapter_counts"
    loads: Count = 0
    load_seconds: Seconds = 0.0
    hits: Count = 0
    failures: Retries = field(default_factory=dict)
    ended: Retries = field(default_factory=dict)
    held: Count = 0
    held_bytes: Bytes = 0


@dataclass(frozen=True)
class StartFailed(Event):
    """A start, or its engine, failed. `message` may name the user's files.

    `limit` and `peak`: bytes of memory, where that was the reason.
    """

    event: ClassVar[str] = "failure"
    reason: Label
    exit_code: ExitCode
    message: Text
    limit: OptionalBytes = None
    peak: OptionalBytes = None

    @classmethod
    def by(cls, error: TensorserveError) -> Self:
        """The failure of `error`. Its hint is left out: the container's log has it."""
        return cls(error.reason, error.exit_code, error.message)


@dataclass(frozen=True)
class EngineExited(Event):
    """The engine has ended with `code`; 128 + n for signal n."""

    event: ClassVar[str] = "engine_exit"
    code: ExitCode


@dataclass(frozen=True)
class FailureScraped(Event):
    """A scrape of /metrics has shown that this start failed."""

    event: ClassVar[str] = "failure_scraped"


@dataclass(frozen=True)
class Unknown(Event):
    """A line of the log with a name that this version does not know, or without what it needs."""

    event: ClassVar[str] = ""
    name: str


EVENTS: Mapping[str, type[Event]] = {
    kind.event: kind
    for kind in (
        StartBegan,
        CheckPassed,
        VerificationKnown,
        SignatureKnown,
        CompiledCacheKnown,
        PhaseChanged,
        LoadPlanned,
        LoadProgressed,
        LoadDone,
        PrefetchProgressed,
        OutputAdvanced,
        WorkerFailed,
        EngineProcessStarted,
        EngineReady,
        AdaptersCounted,
        StartFailed,
        EngineExited,
        FailureScraped,
    )
}
