"""How are the members of an untrusted JSON object read with their types checked?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# 4 PiB, for the sizes of files and tensors. A float represents every integer up to it exactly.
_MAX_BYTES = 2**52
_MAX_MEMBERS = 10_000
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


class JsonFields:
    """A JSON object. Each method returns one member and raises ValueError for another type.

    `where` names the object in errors.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        self._value: dict[str, Any] = value
        self._where = where

    @property
    def content(self) -> Mapping[str, Any]:
        """The whole object."""
        return self._value

    def get(self, name: str) -> object:
        if name not in self._value:
            raise ValueError(f"{self._where} has no {name!r}")
        return self._value[name]

    def _bad(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{name!r} of {self._where} is not {wanted}")

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self._bad(name, "a text")
        return value

    def digest(self, name: str) -> str:
        value = self.text(name)
        if not _HEX_DIGEST.fullmatch(value):
            raise self._bad(name, "a SHA-256 in hex")
        return value

    def natural(self, name: str, most: int = _MAX_BYTES) -> int:
        value = self.get(name)
        # isinstance() would accept a bool as an int.
        if type(value) is not int or not 0 <= value <= most:
            raise self._bad(name, f"a whole number from 0 to {most}")
        return value

    def items(self, name: str) -> list[object]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > _MAX_MEMBERS:
            raise self._bad(name, f"a list of at most {_MAX_MEMBERS}")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        value = self.get(name)
        if not isinstance(value, dict) or len(value) > _MAX_MEMBERS:
            raise self._bad(name, f"an object of at most {_MAX_MEMBERS} members")
        return value
