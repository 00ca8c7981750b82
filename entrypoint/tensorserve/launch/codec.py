"""How does frozen data become JSON for another process, and the same data again there?

Dataclasses become objects with all of their fields, under the fields' names; tuples and frozensets
become lists, paths text, and a Secret its bytes in base64 with its origin. Which type a value is of
is never written: the reader knows it from the annotations of the class that it asks for.
"""

from __future__ import annotations

import base64
import binascii
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tensorserve.errors import TensorserveError
from tensorserve.secret import Secret

Data = TypeVar("Data")
_SCALARS = (bool, int, float, str)
_SECRET, _ORIGIN = "base64", "origin"


def encode(value: object) -> Any:
    """`value` as JSON has it. Raises TypeError for what `decode` could not give back."""
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, Secret):
        return {_SECRET: base64.b64encode(value.reveal()).decode(), _ORIGIN: value.origin}
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(encode(item) for item in value)
    if isinstance(value, Mapping):
        return {str(name): encode(item) for name, item in value.items()}
    raise TypeError(f"{type(value).__name__} cannot be handed over")


def decode(kind: type[Data], document: object) -> Data:
    """The `kind` that `document`, read from JSON, was encoded from.

    Raises TensorserveError where a field is unknown, missing, or of another type: it was written
    by another version. No value is in the message, for it may be secret.
    """
    try:
        found: Data = _decode(kind, document, kind.__name__)
    except _MismatchError as error:
        raise TensorserveError(
            f"What was handed over does not fit: {error}.",
            hint="The package was replaced while it ran. Start again.",
        ) from None
    return found


class _MismatchError(Exception):
    """Says at which field."""


def _decode(kind: Any, document: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return document
    if origin in (Union, types.UnionType):
        return _decode_one(arguments, document, where)
    if kind is None or kind is types.NoneType:
        return _expect(type(None), document, where)
    if kind is float and type(document) is int:
        return float(document)
    if kind in _SCALARS:
        return _expect(kind, document, where)
    if kind is Path:
        return Path(_expect(str, document, where))
    if kind is Secret:
        return _decode_secret(document, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return _decode_fields(kind, document, where)
    if origin is tuple:
        items = _expect(list, document, where)
        kinds = arguments[:1] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(items):
            raise _MismatchError(f"{where} has {len(items)} items")
        pairs = enumerate(zip(kinds, items, strict=True))
        return tuple(_decode(one, item, f"{where}[{n}]") for n, (one, item) in pairs)
    if origin is frozenset:
        items = _expect(list, document, where)
        return frozenset(_decode(arguments[0], item, where) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        items = _expect(dict, document, where)
        return {name: _decode(arguments[1], item, where) for name, item in items.items()}
    raise TypeError(f"{where}: {kind} cannot be handed over")


def _decode_one(kinds: tuple[Any, ...], document: object, where: str) -> Any:
    """The first of `kinds` that fits; no two of those in use take the same."""
    misfit = _MismatchError(where)
    for kind in kinds:
        try:
            return _decode(kind, document, where)
        except _MismatchError as error:
            misfit = error
    raise misfit


def _decode_fields(kind: Any, document: object, where: str) -> Any:
    given, hints = _expect(dict, document, where), _hints(kind)
    names = {field.name for field in fields(kind)}
    for name in sorted(names ^ given.keys()):
        raise _MismatchError(f"{where}.{name} is {'missing' if name in names else 'unknown'}")
    return kind(**{name: _decode(hints[name], given[name], f"{where}.{name}") for name in names})


def _decode_secret(document: object, where: str) -> Secret:
    given = _expect(dict, document, where)
    if given.keys() != {_SECRET, _ORIGIN}:
        raise _MismatchError(f"{where} is no secret")
    try:
        value = base64.b64decode(_expect(str, given[_SECRET], where), validate=True)
    except (binascii.Error, ValueError):
        raise _MismatchError(f"{where} is no base64") from None
    return Secret(value, _expect(str, given[_ORIGIN], where))


def _expect(kind: type, document: Any, where: str) -> Any:
    if type(document) is not kind:
        raise _MismatchError(f"{where} is of type {type(document).__name__}")
    return document


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
