"""What does the exporter's start page show? Words, bars and the last events of the start.

All words are made here and stand in `page.html` already when it is sent; its script only puts newer
ones in their places. Nothing of the user's is among them: the port asks for no password, so names,
addresses and messages from the log are replaced by our own short words.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import threading
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tensorserve.telemetry.events import Follower, events_path
from tensorserve.telemetry.load import label
from tensorserve.telemetry.readiness import Status
from tensorserve.telemetry.state import PHASES, Failure, StartState
from tensorserve.telemetry.story import Note, Story
from tensorserve.telemetry.words import CAUTIONS, FAILURES, NBSP, duration, failed, size

_SECONDS_OF_A_STALL = 5.0
_POLL_STARTING, _POLL_READY = 0.7, 5.0

_DOING = {
    "preflight": "Checking that everything is there",
    "artifacts": "Fetching the configuration and the tokenizer",
    "import": "vLLM is starting",
    "init": "Setting up the empty model",
    "load": "Loading the model",
    "postprocess": "Preparing the weights for the device",
    "warmup": "Warming up the engine",
}
_PHASE_NAMES = {
    "preflight": "Checks",
    "artifacts": "Small files",
    "import": "vLLM starts",
    "init": "Empty model",
    "load": "Load weights",
    "postprocess": "Prepare",
    "warmup": "Warm up",
}
_OUT_OF_MEMORY = "It was killed: most often the memory did not suffice."


class StartPage:
    """The page of the start in `state_dir`. Thread-safe."""

    def __init__(self, state_dir: Path) -> None:
        self._follower = Follower(events_path(state_dir))
        self._story = Story()
        self._lock = threading.Lock()

    def view(self, status: Status) -> dict[str, Any]:
        """What the page shows of `status`, as plain data. Raises OSError: the log is unreadable."""
        with self._lock:
            for event in self._follower.poll():
                self._story.apply(event)
            return view(status, self._story.notes)


def view(status: Status, notes: Iterable[Note]) -> dict[str, Any]:
    """Every word and number of the page; `x` and `width` of a bar are per cent of the time line."""
    state, now = status.state, status.now
    tone, headline, detail = _headline(status)
    percent = _percent(state)
    loading = state.phase == "load" and bool(state.ranks)
    return {
        "tone": tone,
        "headline": headline,
        "detail": detail,
        "caution": CAUTIONS.get(state.verification or "", ""),
        "announcement": _announcement(state, headline),
        "title": f"{percent} loaded" if loading else headline.partition(":")[0],
        "version": f"version {_version(state.version)}" if state.version else "",
        "progress": round(state.progress, 4),
        "percent": percent,
        "loaded": _loaded(state),
        "rate_label": "Mean rate" if state.load_complete else "Rate now",
        "rate": _rate(state, now),
        "left": _left(state, now),
        "elapsed": duration(max(0.0, now - state.began)) if state.began is not None else "–",
        "total": duration(state.startup_seconds(now)) if state.began is not None else "–",
        "phases": [_bar(state, phase, now) for phase in PHASES],
        "events": [
            {
                "at": duration(max(0.0, note.t - (state.began or note.t))),
                "text": note.text,
                "tone": note.tone,
            }
            for note in reversed(tuple(notes))
        ],
        "poll_seconds": _POLL_READY if tone == "ready" else _POLL_STARTING,
    }


def render(content: dict[str, Any]) -> str:
    """The page with `content` (a `view`) in it, complete without its script."""
    values = {name: html.escape(str(value)) for name, value in content.items()}
    values["refresh"] = "10" if content["tone"] == "ready" else "2"
    values["detail_hidden"] = "" if content["detail"] else " hidden"
    values["caution_hidden"] = "" if content["caution"] else " hidden"
    values["phases"] = "".join(_row(bar) for bar in content["phases"])
    values["events"] = "".join(
        f'<li data-tone="{html.escape(event["tone"])}"><span>{html.escape(event["at"])}</span>'
        f"<span>{html.escape(event['text'])}</span></li>"
        for event in content["events"]
    )
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _template())


@cache
def policy() -> str:
    """The page's Content-Security-Policy: its own script and style by hash, its own JSON, no more.

    Bars are SVG, as their widths are attributes: `style` attributes would need 'unsafe-inline'.
    """
    script, style = (_hash(_template(), name) for name in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _headline(status: Status) -> tuple[str, str, str]:
    """(tone, headline, a line below it or nothing)."""
    state, now = status.state, status.now
    took = duration(state.startup_seconds(now))
    if state.failure is not None:
        _, hint = FAILURES.get(state.failure.reason, ("", ""))
        if state.failure.reason == "engine" and state.failure.exit_code == 137:
            hint = _OUT_OF_MEMORY
        hint += _figures(state.failure)
        before = f" It had been ready after {took}." if state.ready_at is not None else ""
        return "failed", failed(state), (hint + before).strip()
    if state.engine_exit is not None:
        when = "" if state.ready_at is not None else f" after {took}, before it was ready"
        return "stopped", f"Stopped{when}", "Somebody asked for it."
    if state.ready_at is not None and not status.ready:
        return (
            "warning",
            "The engine does not answer",
            f"It was ready after {took}; now its /health is silent. A busy engine may recover.",
        )
    if status.ready:
        return "ready", f"Ready after {took}", "The engine answers requests."
    if state.began is None:
        return "waiting", "Waiting for the start", "No start has been recorded yet."
    if state.phase == "load" and state.ranks:
        return _loading(state, now)
    return "working", _DOING[state.phase], _step(state)


def _figures(failure: Failure) -> str:
    parts = []
    if failure.memory_limit is not None:
        parts.append(f" The limit is {size(failure.memory_limit)}.")
    if failure.memory_peak is not None:
        parts.append(f" Up to {size(failure.memory_peak)} were in use.")
    return "".join(parts)


def _loading(state: StartState, now: float) -> tuple[str, str, str]:
    words = f"{_DOING['load']}: {_percent(state)}"
    still = 0.0 if state.last_advance is None else now - state.last_advance
    if still >= _SECONDS_OF_A_STALL:
        return (
            "warning",
            f"{words}, no data for {_whole(still)}",
            "The source is silent; requests are sent again by themselves.",
        )
    rate, eta = state.rate(now), state.eta(now)
    if rate > 0:
        words += f", {size(rate)}/s"
    if eta is not None:
        words += f", {_whole(eta)} left"
    # Tensors go into the model whole, and the first is often the largest.
    copied = f": {size(state.copied_bytes)} are in the model" if state.copied_bytes else ""
    return "working", words, _step(state) + copied


def _step(state: StartState) -> str:
    return f"Step {PHASES.index(state.phase) + 1} of {len(PHASES)}"


def _announcement(state: StartState, headline: str) -> str:
    """What a screen reader says; it changes a few times in a start, the headline every second."""
    if state.phase == "load":
        return f"{_DOING['load']}: {int(state.progress * 4) * 25} %"
    return headline


def _loaded(state: StartState) -> str:
    if not state.planned_bytes:
        return "–"
    arrived, planned = size(state.arrived_bytes), size(state.planned_bytes)
    if arrived == planned:
        return planned
    unit = planned[planned.index(NBSP) :]
    return f"{arrived.removesuffix(unit) if arrived.endswith(unit) else arrived} of {planned}"


def _percent(state: StartState) -> str:
    # Rounded down: 100 % is said when nothing is missing. The tiny sum is for 0.29 * 100 < 29.
    return f"{int(state.progress * 100 + 1e-6)}{NBSP}%"


def _rate(state: StartState, now: float) -> str:
    ended = state.failure is not None or state.engine_exit is not None
    if not state.ranks or (ended and not state.load_complete):
        return "–"
    return f"{size(state.rate(now))}/s"


def _left(state: StartState, now: float) -> str:
    if state.load_complete:
        return "done"
    eta = state.eta(now)
    return "–" if eta is None or state.exit_at is not None else _whole(eta)


def _whole(seconds: float) -> str:
    return f"{seconds:.0f}{NBSP}s" if seconds < 59.5 else duration(seconds)


def _bar(state: StartState, phase: str, now: float) -> dict[str, Any]:
    total = state.startup_seconds(now)
    own = [segment for segment in state.segments if segment.phase == phase]
    if not own or total <= 0:
        return _named(phase, "pending", 0.0, 0.0, "–")
    latest = own[-1]
    kind = "done"
    if latest is state.segments[-1] and state.ready_at is None:
        ended = state.failure is not None or state.engine_exit is not None
        kind = "failed" if ended else "running"
    begin = (own[0].begin - (state.began or 0.0)) / total * 100
    seconds = state.phase_seconds(now)[phase]
    # A phase of milliseconds must still be seen.
    width = min(max(seconds / total * 100, 1.2), 100.0)
    return _named(phase, kind, min(begin, 100.0 - width), width, duration(seconds))


def _named(phase: str, state: str, x: float, width: float, seconds: str) -> dict[str, Any]:
    return {
        "name": _PHASE_NAMES[phase],
        "state": state,
        "x": round(x, 2),
        "width": round(width, 2),
        "seconds": seconds,
    }


def _row(bar: dict[str, Any]) -> str:
    return (
        f'<tr data-state="{bar["state"]}"><th scope="row">{html.escape(bar["name"])}</th>'
        f'<td><svg aria-hidden="true"><rect x="{bar["x"]}%" width="{bar["width"]}%" height="100%" '
        f'rx="3"/></svg></td><td>{html.escape(bar["seconds"])}</td></tr>'
    )


def _version(text: str) -> str:
    """Our own version number, or nothing: a log may have been damaged."""
    return text if re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,20}", text) else label(text)


@cache
def _template() -> str:
    return (resources.files("tensorserve.telemetry") / "page.html").read_text("utf-8")


def _hash(page: str, element: str) -> str:
    found = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    assert found is not None
    return f"sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}"
