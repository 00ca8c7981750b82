"""What is a tensor called, given the bytes of its name in the file?

A plain name is UTF-8. A place in a nested state dict is RFC 7464's record separator and a JSON
array of mapping keys and list indices (tensorizer's "tensor path").
"""

from __future__ import annotations

import json
from typing import NoReturn

_RECORD_SEPARATOR = 0x1E


class BadNameError(ValueError):
    """The bytes are not a tensor's name; the text says why."""


def _refuse(*_: object) -> NoReturn:
    raise BadNameError("holds something other than keys and indices")


def parse_name(raw: bytes) -> str:
    """The name as one string; the parts of a path are joined by dots, as torch joins names.

    ``{"layers": [{"weight": t}]}`` gives ``layers.0.weight``. Two paths may meet in one string
    (a key may hold dots): whoever collects names must refuse duplicates. Raises BadNameError.
    """
    if not raw:
        raise BadNameError("is empty")
    if raw[0] != _RECORD_SEPARATOR:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise BadNameError("is not UTF-8") from None
    # JSON would allow white space around and line breaks within; tensorizer does not.
    if raw[1:2] != b"[" or raw[-1:] != b"]" or b"\n" in raw or b"\r" in raw:
        raise BadNameError("is not a JSON array of keys on one line")
    try:
        path = json.loads(
            raw[1:].decode("ascii"),
            object_hook=_refuse,
            parse_float=_refuse,
            parse_constant=_refuse,
        )
    except BadNameError:
        raise
    except (ValueError, RecursionError):
        raise BadNameError("is not a JSON array") from None
    if not isinstance(path, list) or not path:
        raise BadNameError("is not a JSON array of keys and indices")
    for part in path:
        if type(part) not in (str, int) or (type(part) is int and part < 0):
            _refuse()
    name = ".".join(map(str, path))
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BadNameError("holds a lone surrogate") from None
    return name
