"""Is each event written and read back as it is, and does a damaged line do no harm?"""

from __future__ import annotations

import ast
import functools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tensorserve.telemetry import Check, Edge, Phase, fold, schema
from tensorserve.telemetry.event_codec import Record, decode, encode
from tensorserve.telemetry.exporter import document
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.page import view
from tensorserve.telemetry.page_html import render
from tensorserve.telemetry.progress import describe
from tensorserve.telemetry.readiness import Status
from tensorserve.telemetry.report import render_report, report_json
from tensorserve.telemetry.schema import (
    EVENTS,
    AdaptersCounted,
    CheckPassed,
    CompiledCacheKnown,
    EngineExited,
    EngineProcessStarted,
    EngineReady,
    Event,
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
    Unknown,
    VerificationKnown,
    WorkerFailed,
)

PACKAGE = Path(schema.__file__).parents[1]
COUNTS = LoadCounts(5, 4, 3, 0.5, 0.25, 0.125, requests=7, retries={"reset": 2})
SAMPLES: list[Event] = [
    StartBegan("a", "0.1.0", 1, "http://127.0.0.1:8000/health", 8000, 9400),
    CheckPassed(Check.HOST_MEMORY, "1 GB"),
    VerificationKnown("digests"),
    SignatureKnown("key", "5e" * 32),
    CompiledCacheKnown("brought", "5e" * 32, "/cache/vllm", 2),
    PhaseChanged(Phase.LOAD, Edge.END),
    LoadPlanned(1, bytes=10, tensors=2, loader="reference"),
    LoadProgressed(1, COUNTS),
    LoadDone(1),
    PrefetchProgressed(9, requests=3, retries={"stall": 1}),
    OutputAdvanced(),
    WorkerFailed(1, "RuntimeError: no"),
    EngineProcessStarted("EngineCore", "spawn", "set since the import: X"),
    EngineReady("a"),
    AdaptersCounted(3, 1.5, 9, {"corrupt": 1}, {"removed": 2}, 1, 400),
    StartFailed("out_of_memory", 137, "killed", limit=8, peak=7),
    EngineExited(143),
    FailureScraped(),
]


def line(**given: Any) -> bytes:
    return json.dumps({"t": 1.5, "w": 2.5, "pid": 3} | given).encode()


def read(**given: Any) -> Event:
    record = decode(line(**given))
    assert record is not None
    return record.event


def test_every_event_is_in_the_table_under_its_own_name() -> None:
    """One that is left out would be written and never read."""
    kinds = {kind for kind in Event.__subclasses__() if kind is not Unknown}
    assert set(EVENTS.values()) == kinds == {type(sample) for sample in SAMPLES}
    assert len(EVENTS) == len(kinds)


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.event)
def test_what_is_written_is_what_is_read(event: Event) -> None:
    """Each field, through JSON and back."""
    written = json.dumps(encode(event, t=1.5, wall=2.5, pid=3)).encode()
    assert decode(written) == Record(1.5, 2.5, event)


@pytest.mark.parametrize(("given", "pid"), [(3, 3), (0, None), (True, None), ("3", None)])
def test_a_record_knows_which_process_wrote_it(given: object, pid: int | None) -> None:
    """Where the line says so in a way that can be true."""
    record = decode(line(event="load_done", rank=0, pid=given))
    assert record is not None
    assert record.pid == pid


def test_the_documentation_names_every_event_and_field() -> None:
    """docs/metrics.md is what users read."""
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    for sample in SAMPLES:
        written = encode(sample, t=0, wall=0, pid=0).keys() - {"t", "w", "pid", "event"}
        assert set(re.findall(r"`(\w+)`", rows[sample.event])) >= written


def test_an_event_of_another_version_is_kept_as_unknown() -> None:
    """With its name, unless that could be the user's data."""
    assert read(event="of_tomorrow", rank=1) == Unknown("of_tomorrow")
    assert read(event="s3://bucket") == Unknown("other")


@pytest.mark.parametrize(
    "given",
    [
        {"event": "phase", "state": "begin"},
        {"event": "phase", "phase": "later", "state": "begin"},
        {"event": "phase", "phase": ["load"], "state": "begin"},
        {"event": "phase", "phase": "load", "state": "middle"},
        {"event": "load_plan", "bytes": 5},
        {"event": "load_done", "rank": True},
        {"event": "load_done", "rank": 10**6},
        {"event": "load_progress", "rank": -1},
        {"event": "ready", "start_id": 5},
    ],
)
def test_an_event_without_what_it_needs_is_unknown(given: dict[str, Any]) -> None:
    """It is not guessed at."""
    assert read(**given) == Unknown(given["event"])


def test_a_field_that_cannot_be_used_is_neutral() -> None:
    """Wrong types, wrong signs, and what is too large."""
    assert read(event="load_plan", rank=0, bytes="5", tensors=-1) == LoadPlanned(0, 0, 0, None)
    assert read(event="load_plan", rank=0, bytes=10**30, tensors=True) == LoadPlanned(0, 0, 0, None)
    assert read(event="load_progress", rank=0, fetch=5, retries=[]) == LoadProgressed(
        0, LoadCounts(fetch=5)
    )
    assert read(event="engine_exit", code=256) == EngineExited(70)
    assert read(event="failure", message=["x"]) == StartFailed("other", 70, "")
    assert read(event="check", name="s3://bucket") == CheckPassed(None, "")
    assert read(event="start") == StartBegan(None, "", 0, None, 0, 0)


def test_what_is_read_is_bounded() -> None:
    """Long texts, and reasons that are not of our making."""
    failed = read(event="failure", reason="corrupt", exit_code=65, message="x" * 100_000)
    assert isinstance(failed, StartFailed)
    assert len(failed.message) == 16 * 1024
    retries = {f"reason_{number}": 1 for number in range(1000)}
    ahead = read(event="prefetch_progress", retries=retries)
    assert isinstance(ahead, PrefetchProgressed)
    assert len(ahead.retries) <= 65
    assert sum(ahead.retries.values()) == 1000


FIELDS = sorted(
    {name for sample in SAMPLES for name in encode(sample, t=0, wall=0, pid=0)} - {"t", "event"}
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**35), 10**35)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["load", "begin", "end", "a", 0, 1, "reset", {"reset": 1e300}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
DAMAGED = st.builds(
    lambda name, t, given: {"event": name, "t": t} | given,
    st.sampled_from([*EVENTS, "of_tomorrow"]),
    st.floats(0, 1e6),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(DAMAGED, max_size=8))
def test_no_field_whatever_it_holds_raises_in_a_consumer(lines: list[dict[str, Any]]) -> None:
    """The exporter would be gone, or answer 500 for ever."""
    records = [decode(json.dumps(each).encode()) for each in lines]
    state = fold(record for record in records if record is not None)
    for healthy in (False, True):
        status = Status(state, healthy, state.last_event + 1)
        registry = CollectorRegistry()
        registry.register(StartCollector(lambda status=status: status))
        generate_latest(registry)
        render(view(status))
        json.dumps([document(status), report_json(state), status.waiting_for])
        describe(state, status.now)
        render_report(state, 80, True)


COMMON_WORDS = {"start", "check", "verification", "signature", "phase", "ready", "failure"}
OWN_FORMATS = {
    "config/launch_plan.py": "names of flags",
    "launch/engine_process.py": "words of a message",
    "packing/precompile.py": "names of flags",
    "telemetry/exporter.py": "the JSON of /startupz",
    "telemetry/metrics.py": "labels",
    "telemetry/names.py": "the values of enumerations",
    "telemetry/page.py": "the JSON of the start page",
    "telemetry/page_html.py": "the JSON of the start page",
    "telemetry/report.py": "the JSON of `tensorserve report`",
}
"""Which modules use words that are also names of events or fields, for a format of their own."""


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The package's modules, without the schema."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
        if path != Path(schema.__file__)
    }


def literals(tree: ast.Module) -> set[str]:
    """Its string literals, without docstrings."""
    nodes = list(ast.walk(tree))
    spoken = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken
    }


def test_events_are_emitted_as_objects_everywhere() -> None:
    """`emit("phase", ...)` is what drifted."""
    found = 0
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr not in {"emit", "_emit"}:
                    continue
                found += 1
                assert len(node.args) == 1, module
                assert not node.keywords, module
                assert not isinstance(node.args[0], ast.Constant | ast.Dict), module
    assert found >= 15


def test_no_name_of_an_event_or_field_stands_outside_the_schema() -> None:
    """In any module, for names that mean nothing else; in those that know telemetry, for all."""
    unmistakable = EVENTS.keys() - COMMON_WORDS
    names = {each.name for kind in (*EVENTS.values(), LoadCounts) for each in fields(kind)}
    using = set()
    for module, tree in trees().items():
        said = literals(tree)
        if module != "telemetry/report.py":
            assert not said & unmistakable, module
        knows = module.startswith("telemetry/") or any(
            isinstance(node, ast.ImportFrom) and "tensorserve.telemetry" in (node.module or "")
            for node in ast.walk(tree)
        )
        if knows and said & (names | EVENTS.keys()):
            using.add(module)
    assert using == OWN_FORMATS.keys()
