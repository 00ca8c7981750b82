"""Does the start page say what is going on, in words, and nothing of the user's?"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from telemetry_starts import Engine, at, begin, end, exporting, log_start, progress, whole_start
from tensorserve.telemetry import PHASES, fold
from tensorserve.telemetry.event_codec import Record
from tensorserve.telemetry.page import view
from tensorserve.telemetry.page_html import policy, render
from tensorserve.telemetry.readiness import Status
from tensorserve.telemetry.schema import StartFailed
from tensorserve.telemetry.wording import duration, size


def seen(events: list[Record], now: float, *, healthy: bool = False) -> dict[str, Any]:
    """What the page shows after `events`; spaces that do not break are plain ones here."""
    content = view(Status(fold(events), healthy, now))
    text = json.dumps(content, ensure_ascii=False).replace("\u00a0", " ")
    return dict(json.loads(text))


def notes(content: dict[str, Any]) -> list[str]:
    return [event["text"] for event in content["events"]]


class Outline(HTMLParser):
    """The elements of a page with their attributes, and the texts of those that have an id."""

    VOID = frozenset({"meta", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, name in self.open:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data.replace("\u00a0", " ")


LOADING = [
    *whole_start()[:9],
    at(131, "load_plan", rank=0, bytes=3_000_000_000, tensors=3),
    progress(132, 1_260_000_000),
]


def test_a_load_is_told_with_percent_rate_and_time_left() -> None:
    """The sentence that people came for."""
    content = seen(LOADING, 132.0)
    assert content["headline"] == "Loading the model: 42 %, 1.26 GB/s, 1 s left"
    assert content["loaded"] == "1.26 of 3.00 GB"
    assert (content["rate"], content["left"], content["elapsed"]) == ("1.26 GB/s", "1 s", "32.0 s")
    assert (content["tone"], content["title"]) == ("working", "42 % loaded")
    assert content["detail"] == "Step 5 of 7: 1.26 GB are in the model"


def test_a_load_that_stands_still_is_told_so() -> None:
    """No hopeful number beside a source that says nothing."""
    content = seen(LOADING, 152.0)
    assert content["headline"] == "Loading the model: 42 %, no data for 20 s"
    assert (content["tone"], content["left"]) == ("warning", "–")


@pytest.mark.parametrize(
    ("mode", "said"), [("manifest", ""), ("none", ""), ("digests", "No auth"), ("tags", "TENSORS")]
)
def test_what_vouches_for_less_than_it_could_is_said_to_the_end(mode: str, said: str) -> None:
    """Above the bar, loading and ready; a later start says it anew."""
    start = whole_start()
    events = [start[0], at(start[0].t, "verification", mode=mode), *start[1:]]
    content = seen(events, 500.0, healthy=True)
    assert content["caution"].startswith(said)
    assert bool(content["caution"]) == bool(said)
    assert ("sign" in content["caution"]) == bool(said)
    page = Outline(render(content))
    shown = next(a for _, a in page.elements if a.get("id") == "caution")
    assert ("hidden" in shown) == (not said)
    assert seen([*events, at(900, "start", start_id="b")], 901.0)["caution"] == ""


def test_ready_is_told_with_the_seconds_it_took() -> None:
    """And the page then asks more rarely."""
    content = seen(whole_start(), 500.0, healthy=True)
    assert content["headline"] == "Ready after 1 min 00 s"
    assert (content["tone"], content["left"], content["progress"]) == ("ready", "done", 1.0)
    assert content["poll_seconds"] > seen(LOADING, 132.0)["poll_seconds"]
    assert 0.5 <= seen(LOADING, 132.0)["poll_seconds"] <= 1


def test_an_engine_silent_after_ready_is_not_called_ready() -> None:
    """The words follow /readyz."""
    content = seen(whole_start(), 500.0, healthy=False)
    assert (content["tone"], content["headline"]) == ("warning", "The engine does not answer")


@pytest.mark.parametrize(
    ("reason", "code", "words"),
    [
        ("wrong_key", 65, "Failed: wrong key (exit code 65)"),
        ("corrupt", 65, "Failed: the model is damaged (exit code 65)"),
        ("source_unavailable", 69, "Failed: the source cannot be reached (exit code 69)"),
        ("permission", 77, "Failed: no permission (exit code 77)"),
        ("configuration", 78, "Failed: wrong configuration (exit code 78)"),
        ("of_another_version", 70, "Failed: of another version (exit code 70)"),
    ],
)
def test_a_failure_is_told_in_words_with_its_exit_code(reason: str, code: int, words: str) -> None:
    """Reasons are metric labels; people get sentences."""
    failure = at(133, "failure", reason=reason, exit_code=code, message="canary")
    content = seen([*LOADING, failure], 140.0)
    assert (content["headline"], content["tone"]) == (words, "failed")
    assert notes(content)[0] == words
    assert [bar["state"] for bar in content["phases"]] == [
        *["done"] * 4,
        "failed",
        *["pending"] * 2,
    ]


def test_an_engine_that_was_killed_is_told_with_the_likely_cause() -> None:
    """137 means nothing to most people."""
    content = seen([*LOADING, at(133, "engine_exit", code=137)], 140.0)
    assert content["headline"] == "Failed: the engine ended (exit code 137)"
    assert "memory" in content["detail"]


def test_out_of_memory_is_told_with_figures() -> None:
    """What to raise, and how far it had come."""
    figures = {"limit": 8_000_000_000, "peak": 7_990_000_000}
    failure = at(133, "failure", reason="out_of_memory", exit_code=137, message="m", **figures)
    content = seen([*LOADING, failure], 140.0)
    assert content["headline"] == "Failed: out of memory (exit code 137)"
    detail = content["detail"].replace("\u00a0", " ")
    assert detail.endswith("The limit is 8.00 GB. Up to 7.99 GB were in use.")


def test_a_stop_that_was_asked_for_is_no_failure() -> None:
    """SIGTERM in the middle of a start."""
    content = seen([*LOADING, at(133, "engine_exit", code=143)], 140.0)
    assert content["headline"] == "Stopped after 33.0 s, before it was ready"
    assert (content["tone"], notes(content)[0]) == ("stopped", "Stopped on request")


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_told_in_words(phase: str) -> None:
    """Nobody needs to know the names of the metrics."""
    content = seen([at(100, "start", start_id="a"), begin(101, phase)], 102.0)
    assert len(content["headline"].split()) >= 3
    assert phase not in content["headline"].split()
    assert content["detail"] == f"Step {PHASES.index(phase) + 1} of 7"


def test_before_any_start_the_page_waits() -> None:
    """The exporter may be up first."""
    content = seen([], 1.0)
    assert (content["headline"], content["elapsed"]) == ("Waiting for the start", "–")
    assert {bar["state"] for bar in content["phases"]} == {"pending"}


def test_the_bars_lie_on_one_time_line_without_gaps() -> None:
    """Each begins where the one before ends, and the last ends at the total."""
    bars = seen(whole_start(), 500.0, healthy=True)["phases"]
    place = 0.0
    for bar in bars:
        assert bar["x"] == pytest.approx(place, abs=1.3)
        place = bar["x"] + bar["width"]
    assert place == pytest.approx(100, abs=0.1)
    assert [bar["name"] for bar in bars][2:5] == ["vLLM starts", "Empty model", "Load weights"]
    assert bars[2]["seconds"] == "27.0 s"


def test_the_last_events_tell_of_checks_phases_and_retries() -> None:
    """Latest first, each with its moment; requests sent again together are one line."""
    events = whole_start()
    events[2:2] = [at(101.1, "check", name="vLLM", found="x"), at(101.2, "check", name="device")]
    content = seen(events, 500.0, healthy=True)
    assert notes(content) == [
        "Ready after 1 min 00 s",
        "The weights are prepared (1.0 s)",
        "The weights are in the model (10.0 s)",
        "2 requests sent again: no data for too long",
        "1 request sent again: connection reset",
        "The empty model is set up (1.0 s)",
        "vLLM has started (27.0 s)",
        "Configuration and tokenizer are there (1.0 s)",
        "2 checks passed: vLLM, device (2.0 s)",
        "The start began",
    ]
    assert [event["at"] for event in content["events"]][-2:] == ["2.0 s", "0 s"]


def test_requests_sent_again_for_one_reason_do_not_fill_the_list() -> None:
    """A bad network must not push out everything else."""
    again = [
        progress(132 + step / 10, 1_300_000_000, retries={"status_503": step + 1})
        for step in range(50)
    ]
    lines = notes(seen([*LOADING, *again], 138.0))
    assert lines[0] == "50 requests sent again: the source answered 503"
    assert len(lines) < 8


def test_a_load_by_the_reference_reader_is_noted_once() -> None:
    """It is slower, and meant for a while; with our loader nothing is said."""
    events = whole_start("reference")
    events.insert(9, at(131, "load_plan", rank=1, bytes=1000, tensors=3, loader="reference"))
    lines = notes(seen(events, 500.0, healthy=True))
    assert lines.count("Tensorizer's own reader loads the weights, as configured") == 1
    assert not [line for line in notes(seen(whole_start(), 500.0)) if "reader" in line]


def test_a_second_start_begins_a_new_list() -> None:
    """What happened before belongs to a start that is over."""
    content = seen([*LOADING, at(133, "engine_exit", code=1), at(140, "start", start_id="b")], 141)
    assert notes(content) == ["Started again, start number 2"]


def test_a_screen_reader_is_told_of_steps_not_of_seconds() -> None:
    """The announcement is the same from 25 % to 49 %."""
    early = seen([*LOADING[:-1], progress(132, 800_000_000)], 132.0)
    assert early["announcement"] == seen(LOADING, 132.0)["announcement"]
    assert early["headline"] != seen(LOADING, 132.0)["headline"]


def test_nothing_of_the_users_gets_into_words_or_markup() -> None:
    """Whatever stands in the log: names, addresses, messages and markup stay there."""
    canary = "s3://canary/<script>evil()</script>"
    events = [
        at(100, "start", start_id=canary, version=canary, health_url=canary, port=canary),
        begin(101, "preflight"),
        at(101, "check", name=canary, found=canary),
        at(101, "check", name=[canary], found=canary),
        begin(101, canary),
        end(102, "preflight"),
        begin(102, "load"),
        at(102, "load_plan", rank=0, bytes=1000, tensors=canary, loader=canary),
        progress(103, 10, retries={canary: 3, "ok": canary}),
        at(104, "failure", reason=canary, exit_code=65, message=canary),
        at(105, "engine_exit", code=canary),
    ]
    for count in range(len(events) + 1):
        page = render(seen(events[:count], 106.0))
        assert "canary" not in page
        assert "evil" not in page


def test_markup_in_a_word_is_shown_as_text() -> None:
    """A second line of defence: whatever reaches the template is escaped."""
    content = seen(LOADING, 132.0) | {"headline": "<b>&", "detail": "{{headline}}"}
    page = render(content)
    assert '<h1 id="headline">&lt;b&gt;&amp;</h1>' in page
    assert ">{{headline}}</p>" in page


def test_the_first_state_is_in_the_page_before_any_script_runs() -> None:
    """Also without JavaScript: words, bars, events, and a refresh that is for such browsers."""
    page = render(seen(LOADING, 132.0))
    outline = Outline(page)
    assert outline.texts["headline"] == "Loading the model: 42 %, 1.26 GB/s, 1 s left"
    assert "Load weights" in outline.texts["phases"]
    assert "vLLM has started" in outline.texts["events"]
    assert sum(tag == "rect" for tag, _ in outline.elements) == len(PHASES)
    assert re.search(r'<noscript><meta http-equiv="refresh" content="\d+"></noscript>', page)
    assert page.count('http-equiv="refresh"') == 1
    assert outline.open == []


def test_a_progress_bar_has_a_name_and_a_value() -> None:
    """A native element with its label, for those who cannot see it."""
    elements = Outline(render(seen(LOADING, 132.0))).elements
    (bar,) = [attributes for tag, attributes in elements if tag == "progress"]
    (name,) = [attributes for tag, attributes in elements if tag == "label"]
    assert (bar["value"], bar["max"], name["for"]) == ("0.42", "1", bar["id"])
    roles = {attributes.get("role") for _, attributes in elements}
    assert {"status", "alert"} <= roles
    assert ("html", {"lang": "en"}) in elements


def test_every_id_that_the_script_looks_for_is_there() -> None:
    """And every word that it puts there comes with the data."""
    page = render(seen(LOADING, 132.0))
    ids = {attributes.get("id") for _, attributes in Outline(page).elements}
    assert set(re.findall(r'(?:find|put)\("(\w+)"', page)) <= ids
    names = re.search(r"for \(const id of \[(.*?)\]\)", page)
    assert names is not None
    words = set(re.findall(r'"(\w+)"', names[1]))
    assert words <= ids
    assert words <= seen(LOADING, 132.0).keys()


def test_the_policy_allows_only_the_pages_own_script_and_style(
    tmp_path: Path,
) -> None:
    """Hashes are of what was sent; no attribute runs or styles anything, nothing is fetched."""
    with exporting(tmp_path) as client:
        status, headers, page = client.ask("/")
        _, other, _ = client.ask("/startupz")
    sent = headers["Content-Security-Policy"]
    assert (status, sent) == (200, policy())
    for name in ("script", "style"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in sent
    assert "default-src 'none'" in sent
    assert "unsafe" not in sent
    assert "-src" not in other["Content-Security-Policy"].replace("default-src", "")
    for _, attributes in Outline(page).elements:
        assert not any(name.startswith("on") for name in attributes)
        assert not attributes.keys() & {"style", "src", "href", "srcset", "action", "data"}
    assert "//" not in page


def test_the_data_for_the_script_is_what_the_page_shows(tmp_path: Path) -> None:
    """One view for both; 200 also while starting, as it is no probe."""
    with Engine() as engine:
        log = log_start(tmp_path, engine)
        log.emit(StartFailed("wrong_key", 65, "canary"))
        with exporting(tmp_path) as client:
            status, headers, body = client.ask("/start.json")
            page = client.ask("/")[2]
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert headers["Cache-Control"] == "no-store"
    assert json.loads(body)["headline"] in page
    assert "wrong key" in page
    assert "canary" not in body + page


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.012, "12 ms"), (35.6, "35.6 s"), (59.96, "1 min 00 s"), (125, "2 min 05 s")],
)
def test_durations_are_short_words(seconds: float, words: str) -> None:
    """Milliseconds to minutes."""
    assert duration(seconds).replace("\u00a0", " ") == words


def test_sizes_are_powers_of_a_thousand() -> None:
    """As the metrics, and as networks are sold."""
    words = [size(count).replace("\u00a0", " ") for count in (0, 999, 2e3, 5e6, 1.234e9, 7e11)]
    assert words == ["0 B", "999 B", "2.0 kB", "5.0 MB", "1.23 GB", "700.00 GB"]
