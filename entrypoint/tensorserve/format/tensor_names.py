"""Which name do the bytes of a tensor's name in a file mean?

A plain name is UTF-8. A path in a nested state dict (tensorizer's "tensor path") is RFC 7464's
record separator followed by a JSON array of mapping keys and list indices.
"""

from __future__ import annotations

import json
from typing import NoReturn

_RECORD_SEPARATOR = 0x1E


class BadNameError(ValueError):
    """The bytes are not a valid tensor name. The text continues "the name …"."""


def _refuse(*_: object) -> NoReturn:
    raise BadNameError("holds something other than keys and indices")


def parse_name(raw: bytes) -> str:
    """The name as one string; the parts of a path are joined by dots, as torch joins names.

    ``{"layers": [{"weight": t}]}`` gives ``layers.0.weight``. Two paths may give the same string,
    since keys may contain dots: callers must refuse duplicates. Raises BadNameError.
    """
    if not raw:
        raise BadNameError("is empty")
    if raw[0] != _RECORD_SEPARATOR:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise BadNameError("is not UTF-8") from None
    # JSON allows surrounding white space and line breaks; tensorizer does not.
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
