"""How is JSON read that somebody else wrote? With an end to its numbers and to its depth."""

from __future__ import annotations

import json
from typing import Any

MOST_DIGITS = 40
"""tokenizer_config.json has a number of 31 digits in many models; none is read that needs more."""
MOST_DEPTH = 64


def read_json(data: bytes | bytearray | str) -> Any:
    """As json.loads. Raises ValueError, and no other error, for what cannot be believed.

    Python reads numbers of up to 4,300 digits and refuses longer ones in other words; and what is
    nested ten thousand times ends it with a RecursionError.
    """
    try:
        document = json.loads(data, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(document)
    return document


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number in it has {len(text)} digits")
    return int(text)


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
