"""Where did the time of the last start go? The same answer as a table for people and as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tensorserve.telemetry.load import RankLoad
from tensorserve.telemetry.names import REFERENCE_LOADER, Condition, Sharing, Stage
from tensorserve.telemetry.state import StartState

_COLORS = {"title": "1", "bar": "36", "good": "32", "bad": "31"}
_LEAST_BAR = 8
_UNFINISHED = "unfinished"


def report_json(state: StartState) -> dict[str, Any]:
    """The last start as plain data: seconds, bytes, bytes a second. Ends at its last event."""
    now = state.last_event
    began = state.began or 0.0
    failure = state.failure
    return {
        "start_id": state.start_id,
        "version": state.version,
        "began_at": _moment(state.wall),
        "outcome": _outcome(state),
        "total_seconds": state.startup_seconds(now),
        "phases": [
            {
                "phase": segment.phase,
                "start_seconds": segment.begin - began,
                "seconds": (state.end(now) if segment.end is None else segment.end) - segment.begin,
            }
            for segment in state.segments
        ],
        "ranks": [
            {"rank": number, **_rank(load, state.end(now))}
            for number, load in sorted(state.ranks.items())
        ],
        "starts": state.starts,
        "requests": state.requests,
        "retries": dict(sorted(state.retries.items())),
        "failures": dict(sorted(state.failures.items())),
        **_started(state),
        "engine_exit": state.engine_exit,
        "failure": None
        if failure is None
        else {
            "reason": failure.reason,
            "exit_code": failure.exit_code,
            "message": _printable(failure.message),
        },
    }


def render_report(state: StartState, width: int, color: bool) -> str:
    """The last start as text, `width` columns wide where that is enough for the numbers."""
    report = report_json(state)
    if report["start_id"] is None and not report["phases"]:
        return "There is no start in the event log."
    paint = _Paint(color)
    lines = [paint("title", _headline(report)), "", *_timeline(report, width, paint)]
    if report["ranks"]:
        lines += ["", *_loads(report)]
    if report["requests"] or report["retries"]:
        lines += ["", _requests(report)]
    if "processes" in report:
        lines += ["", *_processes(report["processes"])]
    if report["failure"] is not None:
        failure = report["failure"]
        lines += [
            "",
            paint("bad", f"failed: {failure['reason']}, exit code {failure['exit_code']}"),
            *(f"  {line}" for line in failure["message"].splitlines()),
        ]
    return "\n".join(lines)


def _started(state: StartState) -> dict[str, Any]:
    """How vLLM started its processes, once it has."""
    found = [
        {
            "process": None if one.process is None else _printable(one.process),
            "way": one.way,
            "reason": None if one.reason is None else _printable(one.reason),
        }
        for one in state.processes
    ]
    return {"processes": found} if found else {}


def _processes(processes: list[dict[str, Any]]) -> list[str]:
    ways = {"fork": "forked from the one that has imported vLLM", "spawn": "spawned"}
    return [
        f"{one['process'] or 'all processes'}: {ways.get(one['way'], one['way'])}"
        + (f" ({one['reason']})" if one["reason"] else "")
        for one in processes
    ]


class _Paint:
    def __init__(self, color: bool) -> None:
        self._color = color

    def __call__(self, kind: str, text: str) -> str:
        return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m" if self._color and text else text


def _rank(load: RankLoad, end: float) -> dict[str, Any]:
    finish = end if load.done is None else load.done
    return {
        "bytes": load.copied,
        "planned_bytes": load.planned,
        "tensors": load.tensors,
        "loader": load.loader,
        **({} if load.transport is None else {"transport": load.transport}),
        **({} if load.sharing is None else {"sharing": load.sharing, "opens_bytes": load.opens}),
        "complete": load.done is not None,
        "seconds": max(0.0, finish - load.began),
        "bytes_per_second": load.mean_rate(finish),
        "stages": {
            stage: {"bytes": load.bytes(stage), "thread_seconds": load.seconds(stage)}
            for stage in Stage
        },
    }


def _outcome(state: StartState) -> str:
    # A start that became ready counts as ready, also after its stop.
    if state.failure is None and state.ready_at is not None:
        return Condition.READY
    ended = state.phase in {Condition.FAILED, Condition.STOPPED}
    return state.phase if ended else _UNFINISHED


def _headline(report: dict[str, Any]) -> str:
    began = f" of {report['began_at']}" if report["began_at"] else ""
    total = f"{report['total_seconds']:.2f} s"
    ending = {
        Condition.READY: f"ready after {total}",
        Condition.FAILED: f"failed; {total} of start",
        Condition.STOPPED: f"stopped after {total}, before it was ready",
        _UNFINISHED: f"not ready; {total} so far",
    }[report["outcome"]]
    version = f" (tensorserve {_printable(report['version'])})" if report["version"] else ""
    count = f", the last of {report['starts']}" if report["starts"] > 1 else ""
    return f"Start{began}{count}{version}: {ending}"


def _timeline(report: dict[str, Any], width: int, paint: _Paint) -> list[str]:
    total = report["total_seconds"]
    lines = [f"{'phase':<12}{'start':>9}{'duration':>11}{'share':>8}"]
    bar_width = max(_LEAST_BAR, width - len(lines[0]) - 3)
    for row in report["phases"]:
        share = row["seconds"] / total if total > 0 else 0.0
        offset = round(row["start_seconds"] / total * bar_width) if total > 0 else 0
        offset = min(offset, bar_width - 1)
        length = max(1, min(round(share * bar_width), bar_width - offset))
        bar = " " * offset + paint("bar", "█" * length)
        lines.append(
            f"{row['phase']:<12}{row['start_seconds']:>7.2f} s{row['seconds']:>9.2f} s{share:>8.1%}"
            f"  {bar}"
        )
    lines.append(f"{'total':<12}{'':>9}{total:>9.2f} s{1:>8.1%}")
    return lines


def _loads(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{'load':<10}{'bytes':>12}{'seconds':>9}{'GB/s':>8}"
        + "".join(f"{stage + ' GB':>12}{'thread s':>10}" for stage in Stage)
    ]
    for rank in report["ranks"]:
        stages = "".join(
            f"{stage['bytes'] / 1e9:>12.3f}{stage['thread_seconds']:>10.2f}"
            for stage in rank["stages"].values()
        )
        name = f"rank {rank['rank']}"
        lines.append(
            f"{name:<10}{_size(rank['bytes']):>12}{rank['seconds']:>9.2f}"
            f"{rank['bytes_per_second'] / 1e9:>8.2f}{stages}"
            + ("  reference reader" if rank["loader"] == REFERENCE_LOADER else "")
            + ("  received by urllib3 (slower)" if rank.get("transport") == "urllib3" else "")
            + (
                f"  opens {_size(rank['opens_bytes'])}, the rest comes from other ranks"
                if rank.get("sharing") == Sharing.SHARED
                else ""
            )
            + ("" if rank["complete"] else f"  incomplete: of {_size(rank['planned_bytes'])}")
        )
    return lines


def _requests(report: dict[str, Any]) -> str:
    retries = report["retries"]
    again = sum(retries.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in retries.items())
    return f"{report['requests']} requests, {again} sent again" + (f" ({reasons})" if again else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.3f} GB"


def _moment(wall: float | None) -> str | None:
    if wall is None:
        return None
    try:
        return datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None  # beyond the calendar: the line was damaged


def _printable(text: str) -> str:
    """`text` without control characters: a message may quote a file or a server."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
