"""Do logs that an earlier version wrote still say the same? Expected: recorded before the change.

`logs/real.jsonl` is the log of a real start, `logs/eventful.jsonl` three starts with a failure, two
ranks, prefetching, retries, a kill for memory, a draft model, damaged lines and later events.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tensorserve.telemetry import fold, read_events
from tensorserve.telemetry.event_codec import Record, decode, encode
from tensorserve.telemetry.exporter import document
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.progress import describe
from tensorserve.telemetry.readiness import Status
from tensorserve.telemetry.report import render_report, report_json
from tensorserve.telemetry.schema import Unknown

LOGS = Path(__file__).parent / "logs"


def shown(records: list[Record]) -> dict[str, Any]:
    """What the consumers say a quarter of a second after the last of `records`."""
    state = fold(records)
    now = round(state.last_event + 0.25, 6)
    status = Status(state, state.load_complete and state.failure is None, now)
    registry = CollectorRegistry()
    registry.register(StartCollector(lambda: status))
    lines = generate_latest(registry).decode().splitlines()
    return {
        "events": len(records),
        "now": now,
        # Which versions are installed is no part of the log.
        "metrics": [line for line in lines if line[0] != "#" and "build_info" not in line],
        "startupz": document(status),
        "waiting_for": status.waiting_for,
        "progress": describe(state, now),
        "report": report_json(state),
        "report_text": render_report(state, 80, False).splitlines(),
    }


@pytest.mark.parametrize("name", ["real", "eventful"])
def test_an_earlier_log_folds_to_the_recorded_answers(name: str) -> None:
    """Metrics, /startupz, progress and report, as the code before the schema gave them."""
    records = read_events(LOGS / f"{name}.jsonl")
    expected = json.loads((LOGS / f"{name}.expected.json").read_text())
    for moment in expected:
        found = shown(records[: moment["events"]])
        assert json.loads(json.dumps(found)) == moment


@pytest.mark.parametrize("name", ["real", "eventful"])
def test_events_are_written_as_earlier_versions_wrote_them(name: str) -> None:
    """Each line decoded and encoded again is the same line, its order included."""
    compared = 0
    for line in (LOGS / f"{name}.jsonl").read_bytes().splitlines():
        record = decode(line)
        if record is None or isinstance(record.event, Unknown):
            continue
        given = json.loads(line)
        again = encode(record.event, t=record.t, wall=given["w"], pid=given["pid"])
        assert json.dumps(again).encode() == line
        compared += 1
    assert compared > 30
