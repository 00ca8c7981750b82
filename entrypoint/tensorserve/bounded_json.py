"""How is JSON read that somebody else wrote? With an end to its numbers and to its depth."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MOST_DIGITS = 40
"""tokenizer_config.json has a number of 31 digits in many models; none is read that needs more."""
MOST_DEPTH = 64


def read_json(data: bytes | bytearray | str, *, strict: bool = False) -> Any:
    """As json.loads. Raises ValueError, and no other error, for what cannot be believed.

    `strict`: of one meaning only, whoever reads it: no name twice in an object, no fractions, and
    bytes that are UTF-8. Python itself also takes UTF-16 and -32, and surrogates as bytes: of two
    of those json.dumps makes what it makes of the one character that they stand for.
    Python reads numbers of up to 4,300 digits and refuses longer ones in other words; and what is
    nested ten thousand times ends it with a RecursionError.
    """
    try:
        if strict:
            document = json.loads(
                data if isinstance(data, str) else data.decode(),  # UnicodeDecodeError: ValueError
                parse_int=_integer,
                parse_float=_no_number,
                parse_constant=_no_number,
                object_pairs_hook=_members,
            )
        else:
            document = json.loads(data, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(document)
    return document


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number in it has {len(text)} digits")
    return int(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:MOST_DIGITS]} is no whole number")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object in it has a name twice")
    return found


def _check_depth(document: object) -> None:
    level = [document]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [v for v in value.values() if isinstance(v, dict | list)]
            elif isinstance(value, list):
                inner += [v for v in value if isinstance(v, dict | list)]
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {MOST_DEPTH} times")
