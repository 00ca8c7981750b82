"""Does each event reach each consumer? What it shows there, or that it changes nothing there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from telemetry_starts import at, begin, end, progress, whole_start
from tensorserve.telemetry import ProgressView, events_path, fold, read_events
from tensorserve.telemetry.event_codec import Record, encode
from tensorserve.telemetry.exporter import document
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.page import view
from tensorserve.telemetry.page_html import render
from tensorserve.telemetry.readiness import Status, Watcher
from tensorserve.telemetry.report import render_report, report_json
from tensorserve.telemetry.schema import EVENTS

METRICS, STARTUPZ, PAGE, BAR = "metrics", "startupz", "page", "progress bar"
REPORT, REPORT_JSON, READINESS = "report", "report as JSON", "readiness"


class Gone(str):
    """A text that is shown without the event, and no longer with it."""


@dataclass(frozen=True)
class Case:
    """`event` after `before`, and `then` after both; seen at second `now`.

    `shows`: by consumer, what is there with the event alone. Consumers that are not named show the
    same with and without it.
    """

    before: list[Record]
    event: Record
    now: float
    shows: dict[str, tuple[str, ...]]
    then: list[Record] = field(default_factory=list)


BEGUN = [
    at(100, "start", start_id="a", version="0.1.0", health_url="http://127.0.0.1:1/health"),
    begin(101, "preflight"),
]
LOADING = whole_start()[:11]  # half of 1000 bytes at second 136
KILLED = {"reason": "out_of_memory", "exit_code": 137, "message": "killed for memory"}
FIGURES = {"limit": 8_000_000_000, "peak": 7_000_000_000}

CASES = {
    "start": Case(
        [],
        at(100, "start", start_id="a", version="9.9.9"),
        103,
        {
            METRICS: ("tensorserve_startup_seconds 3.0",),
            STARTUPZ: ('"phase": "preflight"',),
            PAGE: ("version 9.9.9", "Checking that everything is there", "The start began"),
            BAR: ("preflight (3 s since the start)",),
            REPORT: ("(tensorserve 9.9.9)",),
            REPORT_JSON: ('"start_id": "a"', '"version": "9.9.9"', '"starts": 1'),
            READINESS: ("no rank has begun to load yet (phase preflight)",),
        },
    ),
    "check": Case(
        BEGUN,
        at(101, "check", name="host memory for the load", found="1 GB"),
        105,
        {PAGE: ("1 check passed: host memory for the load",)},
        then=[end(104, "preflight")],
    ),
    "verification": Case(
        BEGUN,
        at(101, "verification", mode="digests"),
        105,
        {
            METRICS: ('tensorserve_verification{mode="digests"} 1.0',),
            PAGE: ("compared with the digests in their own file",),
        },
    ),
    "signature": Case(
        BEGUN,
        at(101, "signature", kind="key", fingerprint="5e" * 32),
        105,
        {PAGE: ("Signed by key 5e5e5e5e5e5e5e5e…",)},
    ),
    "compiled_cache": Case(
        BEGUN,
        at(101, "compiled_cache", result="absent", fingerprint="5e" * 32, folder="", keys=0),
        105,
        {METRICS: ('tensorserve_compiled_cache{result="absent"} 1.0',)},
    ),
    "phase begins": Case(
        BEGUN,
        begin(105, "load"),
        106,
        {
            METRICS: ('tensorserve_phase_duration_seconds{phase="load"} 1.0',),
            STARTUPZ: ('"phase": "load"', '"load": 1.0'),
            PAGE: ("Step 5 of 7", "All checks passed (5.0 s)"),
            BAR: ("load (6 s since the start)",),
            REPORT: ("load           5.00 s",),
            REPORT_JSON: ('"phase": "load"',),
            READINESS: ("(phase load)",),
        },
    ),
    "phase ends": Case(
        [*BEGUN, begin(105, "import")],
        end(107, "import"),
        108,
        {
            METRICS: ('tensorserve_phase_duration_seconds{phase="import"} 2.0',),
            STARTUPZ: ('"phase": "init"', '"import": 2.0'),
            PAGE: ("Setting up the empty model", "vLLM has started (2.0 s)"),
            BAR: ("init (8 s since the start)",),
            REPORT: ("import         5.00 s     2.00 s",),
            REPORT_JSON: ('"phase": "init"',),
            READINESS: ("(phase init)",),
        },
    ),
    "load_plan": Case(
        whole_start()[:9],
        at(
            131, "load_plan", rank=3, bytes=1000, tensors=7, loader="reference", transport="libcurl"
        ),
        132,
        {
            METRICS: (
                'tensorserve_load_size_bytes{rank="3"} 1000.0',
                'tensorserve_load_info{loader="reference",rank="3",transport="libcurl"} 1.0',
            ),
            STARTUPZ: ('"total_bytes": 1000',),
            PAGE: ("0 % loaded", "Tensorizer's own reader loads the weights, as configured"),
            BAR: ("load with the reference reader   0%",),
            REPORT: ("rank 3", "reference reader"),
            REPORT_JSON: ('"planned_bytes": 1000', '"tensors": 7', '"loader": "reference"'),
            READINESS: ("still loading: rank 3",),
        },
    ),
    "load_progress": Case(
        whole_start()[:10],
        progress(136, 500, decrypt=600, fetch=700, requests=4, retries={"stall": 2}),
        137,
        {
            METRICS: (
                'tensorserve_load_bytes_total{rank="0",stage="fetch"} 700.0',
                'tensorserve_load_bytes_total{rank="0",stage="decrypt"} 600.0',
                'tensorserve_load_bytes_total{rank="0",stage="copy"} 500.0',
                'tensorserve_load_stage_seconds_total{rank="0",stage="fetch"} 1.0',
                'tensorserve_load_stage_seconds_total{rank="0",stage="decrypt"} 0.5',
                'tensorserve_load_stage_seconds_total{rank="0",stage="copy"} 0.25',
                'tensorserve_load_progress_ratio{rank="0"} 0.7',
                "tensorserve_fetch_requests_total 4.0",
                'tensorserve_fetch_retries_total{reason="stall"} 2.0',
            ),
            STARTUPZ: ('"bytes": 700', '"progress": 0.7', '"retries": {"stall": 2}'),
            PAGE: ("70 % loaded", "2 requests sent again: no data for too long"),
            BAR: ("████████████████░░░░░░░░ load  70%",),
            REPORT: ("4 requests, 2 sent again (stall 2)",),
            REPORT_JSON: ('"copy": {"bytes": 500, "thread_seconds": 0.25}', '"requests": 4'),
        },
    ),
    "load_done": Case(
        whole_start()[:12],
        at(141, "load_done", rank=0),
        142,
        {
            METRICS: ('tensorserve_load_throughput_bytes_per_second{rank="0"} 100.0',),
            STARTUPZ: ('"rate": 100',),
            PAGE: ('"left": "done"', "Mean rate"),
            REPORT: (Gone("incomplete"),),
            REPORT_JSON: ('"complete": true',),
            READINESS: (
                Gone("still loading: rank 0"),
                "asked http://127.0.0.1:1/health",
                "logged phase, ready",
            ),
        },
    ),
    "prefetch_progress": Case(
        whole_start()[:7],
        at(130, "prefetch_progress", bytes=5, requests=3, retries={"dns": 2}),
        131,
        {
            METRICS: (
                "tensorserve_fetch_requests_total 3.0",
                'tensorserve_fetch_retries_total{reason="dns"} 2.0',
            ),
            STARTUPZ: ('"retries": {"dns": 2}',),
            PAGE: ("2 requests sent again: name not found",),
            REPORT: ("3 requests, 2 sent again (dns 2)",),
            REPORT_JSON: ('"requests": 3', '"retries": {"dns": 2}'),
        },
    ),
    # Both are for who ends a start that does not end by itself (launch/start_watch.py).
    "output": Case(LOADING, at(136, "output"), 137, {}),
    "worker_failed": Case(
        LOADING, at(136, "worker_failed", rank=0, error="RuntimeError: no"), 137, {}
    ),
    "engine_process": Case(
        BEGUN,
        at(101, "engine_process", process="EngineCore", way="spawn", reason="open devices"),
        105,
        {
            REPORT: ("EngineCore: spawned (open devices)",),
            REPORT_JSON: ('"process": "EngineCore"', '"way": "spawn"'),
        },
        then=[end(104, "preflight")],
    ),
    "ready": Case(
        whole_start()[:-1],
        at(160, "ready", start_id="a"),
        165,
        {
            METRICS: ("tensorserve_startup_seconds 60.0",),
            STARTUPZ: ('"phase": "ready"', '"startup_seconds": 60.0'),
            PAGE: ("Ready after 1 min 00 s",),
            BAR: ("tensorserve: ready after 60.0 s\n",),
            REPORT: ("ready after 60.00 s",),
            REPORT_JSON: ('"outcome": "ready"',),
            READINESS: (Gone("logged phase, ready"),),
        },
    ),
    "adapter_counts": Case(
        whole_start(),
        at(
            170,
            "adapter_counts",
            loads=3,
            load_seconds=1.5,
            hits=9,
            failures={"corrupt": 1},
            ended={"removed": 2},
            held=1,
            held_bytes=400,
        ),
        171,
        {
            METRICS: (
                "tensorserve_adapter_loads_total 3.0",
                "tensorserve_adapter_load_seconds_total 1.5",
                "tensorserve_adapter_hits_total 9.0",
                'tensorserve_adapter_failures_total{reason="corrupt"} 1.0',
                'tensorserve_adapter_ends_total{reason="removed"} 2.0',
                "tensorserve_adapters 1.0",
                "tensorserve_adapters_held_bytes 400.0",
            ),
        },
    ),
    "failure": Case(
        LOADING,
        at(136, "failure", **KILLED, **FIGURES),
        137,
        {
            METRICS: ('tensorserve_failures_total{reason="out_of_memory"} 1.0',),
            STARTUPZ: ('"phase": "failed"', '"failures": {"out_of_memory": 1}'),
            PAGE: (
                "Failed: out of memory (exit code 137)",
                "The limit is 8.00 GB. Up to 7.00 GB were in use.",
            ),
            BAR: (Gone("load"),),
            REPORT: ("failed: out_of_memory, exit code 137\n  killed for memory",),
            REPORT_JSON: ('"message": "killed for memory"', '"exit_code": 137'),
            READINESS: (
                "the start failed: out_of_memory (exit code 137)",
                "logged failure_scraped",
            ),
        },
    ),
    "engine_exit as asked": Case(
        LOADING,
        at(136, "engine_exit", code=143),
        137,
        {
            METRICS: (
                "tensorserve_startup_seconds 36.0",
                'tensorserve_load_throughput_bytes_per_second{rank="0"} 0.0',
            ),
            STARTUPZ: ('"phase": "stopped"',),
            PAGE: ("Stopped after 36.0 s, before it was ready", "Stopped on request"),
            BAR: (Gone("load"),),
            REPORT: ("stopped after 36.00 s, before it was ready",),
            REPORT_JSON: ('"engine_exit": 143', '"outcome": "stopped"'),
            READINESS: ("the engine ended with code 143",),
        },
    ),
    "engine_exit by itself": Case(
        LOADING,
        at(136, "engine_exit", code=1),
        137,
        {
            METRICS: ('tensorserve_failures_total{reason="engine"} 1.0',),
            STARTUPZ: ('"failures": {"engine": 1}',),
            PAGE: ("Failed: the engine ended (exit code 1)",),
            BAR: (Gone("load"),),
            REPORT: ("failed: engine, exit code 1\n  The engine ended by itself with code 1",),
            REPORT_JSON: ('"engine_exit": 1', '"outcome": "failed"'),
            READINESS: ("the start failed: engine (exit code 1)",),
        },
    ),
    "failure_scraped": Case(
        [*LOADING, at(136, "failure", **KILLED)],
        at(136, "failure_scraped"),
        137,
        {READINESS: (Gone("logged failure_scraped"),)},
    ),
}


class Terminal(io.StringIO):
    """What a person at a terminal sees."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def as_of(records: list[Record], now: float) -> Status:
    """The status, with an engine that answers once the load is complete."""
    state = fold(records)
    answers = state.load_complete and state.failure is None and state.engine_exit is None
    return Status(state, answers, now)


def metrics(_before: list[Record], after: list[Record], now: float, _folder: Path) -> str:
    registry = CollectorRegistry()
    registry.register(StartCollector(lambda: as_of(after, now)))
    return generate_latest(registry).decode()


def startupz(_before: list[Record], after: list[Record], now: float, _folder: Path) -> str:
    return json.dumps(document(as_of(after, now)))


def page(_before: list[Record], after: list[Record], now: float, _folder: Path) -> str:
    content = view(as_of(after, now))
    shown = json.dumps(content, ensure_ascii=False) + render(content)
    return shown.replace("\u00a0", " ")


def bar(before: list[Record], after: list[Record], now: float, _folder: Path) -> str:
    """What is written when the state goes over from `before` to `after`."""
    terminal = Terminal()
    shown = ProgressView(terminal)
    shown.update(fold(before), now - 1)
    terminal.truncate(0)
    shown.update(fold(after), now)
    return terminal.getvalue()


def report(_before: list[Record], after: list[Record], _now: float, _folder: Path) -> str:
    return render_report(fold(after), 80, False)


def report_as_json(_before: list[Record], after: list[Record], _now: float, _folder: Path) -> str:
    return json.dumps(report_json(fold(after)))


def readiness(_before: list[Record], after: list[Record], _now: float, folder: Path) -> str:
    """Why it is not ready, which URL was asked, and what the watcher logs; a scrape included."""
    path = events_path(folder)
    lines = [encode(each.event, t=each.t, wall=each.wall or 0, pid=1) for each in after]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked: list[str] = []
    watcher = Watcher(folder, lambda url: not asked.append(url))  # type: ignore[func-returns-value]
    watcher.step()
    waiting_for = watcher.look().waiting_for
    watcher.failure_was_scraped()
    logged = [each.event.event for each in read_events(path)[len(after) :]]
    return f"{waiting_for}; asked {', '.join(asked)}; logged {', '.join(logged)}"


CONSUMERS: dict[str, Callable[[list[Record], list[Record], float, Path], str]] = {
    METRICS: metrics,
    STARTUPZ: startupz,
    PAGE: page,
    BAR: bar,
    REPORT: report,
    REPORT_JSON: report_as_json,
    READINESS: readiness,
}


def test_every_event_has_a_case() -> None:
    """A new one is added here, or it is shown nowhere."""
    assert {case.event.event.event for case in CASES.values()} == EVENTS.keys()


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", CASES)
def test_each_event_is_shown_by_each_consumer(
    name: str, consumer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the event there is what is not there without it; else nothing changes."""
    monkeypatch.setenv("TERM", "xterm")
    case, shown = CASES[name], CONSUMERS[consumer]
    before = [*case.before, *case.then]
    after = [*case.before, case.event, *case.then]
    without = shown(case.before, before, case.now, tmp_path)
    found = shown(case.before, after, case.now, tmp_path)
    if consumer not in case.shows:
        assert found == without
    for text in case.shows.get(consumer, ()):
        assert (text in found, text in without) == (
            (False, True) if isinstance(text, Gone) else (True, False)
        )
