"""What does the exporter's start page say? Words, bars and the last events of the start.

All words are made here, and page_html.py puts them into the page before it is sent; the page's
script only replaces them by newer ones. None of them comes from the user: the port asks for no
password, so names, addresses and messages from the log are replaced by words of our own.
"""

from __future__ import annotations

import re
from typing import Any

from tensorserve.telemetry.event_notes import notes_of
from tensorserve.telemetry.event_values import label
from tensorserve.telemetry.names import (
    CAUTIONS,
    ENGINE_ENDED,
    FAILURES,
    PHASE_WORDS,
    PHASES,
    Condition,
    Phase,
)
from tensorserve.telemetry.readiness import Status
from tensorserve.telemetry.schema import StartFailed
from tensorserve.telemetry.state import StartState
from tensorserve.telemetry.wording import NBSP, duration, failed, size

_SECONDS_OF_A_STALL = 5.0
_POLL_STARTING, _POLL_READY = 0.7, 5.0

_OUT_OF_MEMORY = "It was killed, most often because memory ran out."


def view(status: Status) -> dict[str, Any]:
    """Every word and number of the page, as plain data.

    `x` and `width` of a bar are per cent of the time line, `poll_seconds` the time until the page
    asks again.
    """
    state, now = status.state, status.now
    tone, headline, detail = _headline(status)
    percent = _percent(state)
    loading = state.phase is Phase.LOAD and bool(state.ranks)
    return {
        "tone": tone,
        "headline": headline,
        "detail": detail,
        "caution": CAUTIONS.get(state.verification or "", ""),
        "signature": _signature(state),
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
            for note in reversed(notes_of(state))
        ],
        "poll_seconds": _POLL_READY if tone == "ready" else _POLL_STARTING,
    }


def _headline(status: Status) -> tuple[str, str, str]:
    """(tone, headline, a line below it or an empty text)."""
    state, now = status.state, status.now
    took = duration(state.startup_seconds(now))
    if state.failure is not None:
        words = FAILURES.get(state.failure.reason)
        hint = words.hint if words else ""
        if state.failure.reason == ENGINE_ENDED and state.failure.exit_code == 137:
            hint = _OUT_OF_MEMORY
        hint += _figures(state.failure)
        before = f" It had been ready after {took}." if state.ready_at is not None else ""
        return (
            "failed",
            failed(state.failure.reason, state.failure.exit_code),
            (hint + before).strip(),
        )
    if state.engine_exit is not None:
        when = "" if state.ready_at is not None else f" after {took}, before it was ready"
        return "stopped", f"Stopped{when}", "The stop was requested."
    if state.ready_at is not None and not status.ready:
        return (
            "warning",
            "The engine does not answer",
            f"It was ready after {took}; now /health does not answer. A busy engine may recover.",
        )
    if status.ready:
        return "ready", f"Ready after {took}", "The engine answers requests."
    if isinstance(state.phase, Condition):
        return "waiting", "Waiting for the start", "No start has been recorded yet."
    if state.phase is Phase.LOAD and state.ranks:
        return _loading(state, now)
    return "working", PHASE_WORDS[state.phase].running, _step(state.phase)


def _figures(failure: StartFailed) -> str:
    parts = []
    if failure.limit is not None:
        parts.append(f" The limit is {size(failure.limit)}.")
    if failure.peak is not None:
        parts.append(f" Up to {size(failure.peak)} were in use.")
    return "".join(parts)


def _loading(state: StartState, now: float) -> tuple[str, str, str]:
    words = f"{PHASE_WORDS[Phase.LOAD].running}: {_percent(state)}"
    still = 0.0 if state.last_advance is None else now - state.last_advance
    if still >= _SECONDS_OF_A_STALL:
        return (
            "warning",
            f"{words}, no data for {_whole(still)}",
            "The source sends nothing; requests are sent again automatically.",
        )
    rate, eta = state.rate(now), state.eta(now)
    if rate > 0:
        words += f", {size(rate)}/s"
    if eta is not None:
        words += f", {_whole(eta)} left"
    # Said only when there are some: a tensor goes into the model as a whole, and the first one is
    # often the largest.
    copied = f": {size(state.copied_bytes)} are in the model" if state.copied_bytes else ""
    return "working", words, _step(Phase.LOAD) + copied


def _step(phase: Phase) -> str:
    return f"Step {PHASES.index(phase) + 1} of {len(PHASES)}"


def _announcement(state: StartState, headline: str) -> str:
    """What a screen reader says. It changes a few times in a start, unlike the headline."""
    if state.phase is Phase.LOAD:
        return f"{PHASE_WORDS[Phase.LOAD].running}: {int(state.progress * 4) * 25} %"
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
    # Rounded down, so that 100 % means all. 1e-6 makes up for 0.29 * 100 being below 29.
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


def _bar(state: StartState, phase: Phase, now: float) -> dict[str, Any]:
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
    # A phase of milliseconds stays visible.
    width = min(max(seconds / total * 100, 1.2), 100.0)
    return _named(phase, kind, min(begin, 100.0 - width), width, duration(seconds))


def _named(phase: Phase, state: str, x: float, width: float, seconds: str) -> dict[str, Any]:
    return {
        "name": PHASE_WORDS[phase].title,
        "state": state,
        "x": round(x, 2),
        "width": round(width, 2),
        "seconds": seconds,
    }


def _signature(state: StartState) -> str:
    """Who signed: a fingerprint is nobody's data. A certificate's subject is, and is left out."""
    signature = state.signature
    if signature is None or not re.fullmatch(r"[0-9a-f]{64}", signature.fingerprint):
        return ""
    return f"Signed by {label(signature.kind)} {signature.fingerprint[:16]}…"


def _version(text: str) -> str:
    """`text` if it is a version number or a label: a damaged log may hold other data."""
    return text if re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,20}", text) else label(text)
