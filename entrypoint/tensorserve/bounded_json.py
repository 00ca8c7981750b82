"""How is untrusted JSON parsed, with limits for its numbers and its depth?"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MOST_DIGITS = 40
"""Many models have a number of 31 digits in tokenizer_config.json; no known file needs more."""
MOST_DEPTH = 64


def read_json(data: bytes | bytearray | str, *, strict: bool = False) -> Any:
    """As json.loads, with limits. Raises only ValueError, for invalid JSON and beyond the limits.

    Limits: 40 digits for a whole number and 64 levels of nesting. (json.loads accepts 4,300 digits
    and raises RecursionError for deep nesting.)

    `strict` accepts only documents that every parser reads alike: no repeated name in an object,
    no fractions, and UTF-8 only. json.loads also accepts UTF-16, UTF-32 and surrogates encoded as
    bytes; a pair of those and the character that it stands for give the same output of json.dumps.
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
    raise ValueError(f"{text[:MOST_DIGITS]} is not a whole number")


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
