"""How does an event stand on the log, and how is a line of the log read?

A line is a JSON object: `{"t": monotonic s, "w": wall s, "pid": int, "event": its name}` and the
event's fields.

`decode` is bounded and tolerant, as a log may be damaged or written by another version: a field
that cannot be used becomes its neutral value; an event without a field that it needs, or of an
unknown name, becomes an `Unknown`. A line that is no event at all becomes None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from tensorserve.bounded_json import read_json
from tensorserve.telemetry.event_values import MISSING, label, seconds_or_zero
from tensorserve.telemetry.schema import EVENTS, Event, Unknown

MOST_LINE_BYTES = 1024 * 1024
_MOST_SECONDS = 1e12
_MOST_PID = 2**22  # PID_MAX_LIMIT, linux/threads.h


@dataclass(frozen=True)
class Record:
    """An event of the log: monotonic seconds `t`, seconds of the wall clock `wall`.

    `pid`: of the process that wrote it.
    """

    t: float
    wall: float | None
    event: Event
    pid: int | None = field(default=None, compare=False)


def encode(event: Event, *, t: float, wall: float, pid: int) -> dict[str, Any]:
    """The JSON object of `event` on the log. Fields that are None are left out."""
    return {"t": t, "w": wall, "pid": pid, "event": event.event, **_flat(event)}


def decode(line: bytes) -> Record | None:
    """The event of one line of the log; None where it is none."""
    try:
        if len(line) > MOST_LINE_BYTES:
            return None
        given = read_json(line)
    except ValueError:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("event"), str):
        return None
    t = given.get("t")
    if isinstance(t, bool) or not isinstance(t, int | float):
        return None
    if not -_MOST_SECONDS < t < _MOST_SECONDS:  # nor NaN
        return None
    kind = EVENTS.get(given["event"])
    try:
        event = _made(kind, given) if kind else Unknown(label(given["event"]))
    except (ValueError, TypeError):  # TypeError: an enumeration looks a list up
        event = Unknown(label(given["event"]))
    wall = seconds_or_zero(given.get("w")) or None
    return Record(float(t), wall, event, _pid(given.get("pid")))


def _pid(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST_PID:
        return None
    return value


def _flat(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; those of a dataclass within it stand beside them."""
    flat: dict[str, Any] = {}
    for each in fields(value):
        inner = getattr(value, each.name)
        if is_dataclass(inner):
            flat |= _flat(inner)
        elif inner is not None:
            flat[each.name] = inner
    return flat


def _made(kind: Any, given: Mapping[str, object]) -> Any:
    """A `kind` of the JSON object `given`. Raises ValueError, TypeError for what it cannot be."""
    return kind(
        **{
            name: _made(reads, given) if is_dataclass(reads) else reads(given.get(name, MISSING))
            for name, reads in _readers(kind).items()
        }
    )


@cache
def _readers(kind: Any) -> Mapping[str, Any]:
    """By field: the dataclass that it is, or the function that reads its JSON value."""
    hints = get_type_hints(kind, include_extras=True)
    types = {each.name: hints[each.name] for each in fields(kind)}
    return {
        name: given if is_dataclass(given) else get_args(given)[1] for name, given in types.items()
    }
