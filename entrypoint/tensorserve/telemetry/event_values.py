"""What may a field of an event hold, and what is read where the log holds something else?

A field is annotated with one of the types below; each carries the function that reads its JSON
value, or `MISSING`. Whatever the value is, the function gives one of the type, or raises ValueError
where an event is of no use without it. Sizes, texts and numbers of names are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from tensorserve.telemetry.names import OTHER, Check, Edge, Phase

MISSING = object()
"""Instead of the value of a field that is not there."""
_MOST_TEXT = 16 * 1024  # characters
_MOST_COUNT = 2**63  # more bytes than any file has
_MOST_RANKS = 65536
_MOST_RETRY_REASONS = 64
_NO_CODE = 70  # EX_SOFTWARE, as for an unexpected error


def _count(value: object) -> int:
    """A whole number that is not negative, else 0."""
    return int(seconds_or_zero(value))


def seconds_or_zero(value: object) -> float:
    """A number that is finite and not negative, else 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    # Compared before it is converted: an int may be larger than any float.
    return float(value) if 0 <= value < _MOST_COUNT else 0.0


def _count_or_none(value: object) -> int | None:
    return _count(value) or None


def _code(value: object) -> int:
    """An exit code of a process, 0 to 255."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value
    return _NO_CODE


def _text(value: object) -> str:
    return value[:_MOST_TEXT] if isinstance(value, str) else ""


def _text_or_none(value: object) -> str | None:
    return _text(value) or None


def _label_or_none(value: object) -> str | None:
    return None if value is MISSING else label(value)


def _identifier_or_none(value: object) -> str | None:
    if value is MISSING:
        return None
    if not isinstance(value, str):
        raise ValueError("no identifier")
    return value[:_MOST_TEXT]


def _check(value: object) -> Check | None:
    return next((check for check in Check if check == value), None)


def _retries(value: object) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for reason, count in value.items() if isinstance(value, dict) else ():
        name = label(reason)
        if name not in counts and len(counts) >= _MOST_RETRY_REASONS:
            name = OTHER
        counts[name] = counts.get(name, 0) + _count(count)
    return counts


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_RANKS:
        raise ValueError("no rank")
    return value


def label(value: object) -> str:
    """`value` if it is a short name of our own making, else `other`: labels take no user data."""
    if isinstance(value, str) and 0 < len(value) <= 40 and value.isascii():
        plain = value.replace("_", "")
        if plain.isalnum() and plain == plain.lower():
            return value
    return OTHER


Bytes = Annotated[int, _count]
Count = Annotated[int, _count]
Seconds = Annotated[float, seconds_or_zero]
OptionalBytes = Annotated[int | None, _count_or_none]
Rank = Annotated[int, _rank]
ExitCode = Annotated[int, _code]
Text = Annotated[str, _text]
OptionalText = Annotated[str | None, _text_or_none]
OptionalIdentifier = Annotated[str | None, _identifier_or_none]
Label = Annotated[str, label]
OptionalLabel = Annotated[str | None, _label_or_none]
Retries = Annotated[Mapping[str, int], _retries]
PhaseName = Annotated[Phase, Phase]
EdgeName = Annotated[Edge, Edge]
KnownCheck = Annotated[Check | None, _check]
