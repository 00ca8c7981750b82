"""Does the report say where the time of the last start went?"""

from __future__ import annotations

import json

import pytest

from telemetry_starts import at, begin, progress, whole_start
from tensorserve.telemetry import fold
from tensorserve.telemetry.report import render_report, report_json


def rows(text: str) -> dict[str, list[str]]:
    """{first word: the other words} of each line."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_each_phase_is_a_row_with_start_duration_and_share() -> None:
    """The load began 31 s into a start of 60 s and took 10 s of it."""
    found = rows(render_report(fold(whole_start()), 80, False))
    assert found["load"][:5] == ["bytes", "seconds", "GB/s", "fetch", "GB"]
    assert found["import"][:5] == ["3.00", "s", "27.00", "s", "45.0%"]
    assert found["total"] == ["60.00", "s", "100.0%"]


def test_rows_sum_to_the_total() -> None:
    """Nothing of the start is unaccounted for."""
    report = report_json(fold(whole_start()))
    assert sum(row["seconds"] for row in report["phases"]) == pytest.approx(60)
    assert report["total_seconds"] == 60


def test_bars_follow_each_other_and_fit_the_width() -> None:
    """Each bar stands where its phase began, and no phase row is wider than asked for."""
    lines = render_report(fold(whole_start()), 100, False).splitlines()
    bars = {line.split()[0]: line for line in lines if "█" in line}
    assert max(len(line) for line in bars.values()) <= 100
    assert bars["warmup"].index("█") > bars["load"].index("█") > bars["import"].index("█")
    assert bars["import"].count("█") > bars["load"].count("█")


def test_each_rank_has_a_line_with_bytes_seconds_and_rate() -> None:
    """1000 bytes in 10 s, and what each stage did."""
    report = report_json(fold(whole_start()))
    (rank,) = report["ranks"]
    assert (rank["bytes"], rank["seconds"], rank["bytes_per_second"]) == (1000, 10, 100)
    assert rank["stages"]["decrypt"] == {"bytes": 1000, "thread_seconds": 0.5}
    assert "rank 0" in render_report(fold(whole_start()), 80, False)


def test_retries_are_named_by_reason() -> None:
    """A slow load often has its cause here."""
    text = render_report(fold(whole_start()), 80, False)
    assert "7 requests, 3 sent again (reset 1, stall 2)" in text


def test_a_failure_is_shown_with_its_message() -> None:
    """The report of a failed start says why, and how far it came."""
    events = [
        *whole_start()[:11],
        at(137, "failure", reason="corrupt", exit_code=65, message="bad"),
    ]
    text = render_report(fold(events), 80, False)
    assert "failed: corrupt, exit code 65\n  bad" in text
    assert "incomplete" in text


def test_a_message_cannot_steer_the_terminal() -> None:
    """It may quote what a server sent."""
    failure = at(9, "failure", reason="corrupt", exit_code=65, message="\x1b]0;owned\x07\rbad")
    events = [at(0, "start", version="\x1b[2J"), failure]
    text = render_report(fold(events), 80, False) + json.dumps(report_json(fold(events))["failure"])
    assert not any(c in text for c in "\x1b\x07\r")


def test_color_is_only_where_it_was_asked_for() -> None:
    """NO_COLOR and pipes get plain text; color changes nothing else."""
    plain, colored = (render_report(fold(whole_start()), 80, color) for color in (False, True))
    assert "\x1b" not in plain
    assert "\x1b[" in colored


def test_only_the_last_start_is_reported() -> None:
    """And that there were others is said."""
    events = [*whole_start(), at(200, "start", start_id="b"), begin(200, "import")]
    report = report_json(fold(events))
    assert [row["phase"] for row in report["phases"]] == ["import"]
    assert "the last of 2" in render_report(fold(events), 80, False)


def test_a_start_whose_log_just_stops_ends_at_its_last_event() -> None:
    """Killed with the machine: what was known counts, not the time since."""
    events = [*whole_start()[:10], progress(136, 500)]
    report = report_json(fold(events))
    assert (report["outcome"], report["total_seconds"]) == ("unfinished", 36)


def test_a_load_by_the_reference_reader_says_so() -> None:
    """It is slower: whoever compares two reports has to see it."""
    state = fold(whole_start())
    assert report_json(state)["ranks"][0]["loader"] == "auto"
    assert "reference" not in render_report(state, 80, False)
    state = fold(whole_start("reference"))
    assert report_json(state)["ranks"][0]["loader"] == "reference"
    assert "reference reader" in render_report(state, 80, False)


def test_an_empty_log_says_so() -> None:
    """Instead of an empty table."""
    assert render_report(fold([]), 80, False) == "There is no start in the event log."


def test_the_json_report_is_json() -> None:
    """It goes to programs."""
    assert json.loads(json.dumps(report_json(fold(whole_start()))))["outcome"] == "ready"
