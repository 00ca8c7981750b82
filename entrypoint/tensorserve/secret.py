"""A value that must not be shown: held as bytes, revealed only when asked by name."""

from __future__ import annotations

import hmac
from typing import NoReturn
from urllib.parse import urlsplit, urlunsplit

REDACTED = "***"


class Secret:
    """Bytes that print as ``***``, compare in constant time, and refuse to be pickled.

    ``origin`` says where the value came from ("TENSORSERVE_KEY_FILE=/run/secrets/k"), for messages.
    """

    __slots__ = ("_value", "origin")

    def __init__(self, value: bytes | str, origin: str = "") -> None:
        self._value = value.encode() if isinstance(value, str) else bytes(value)
        self.origin = origin

    def reveal(self) -> bytes:
        """The bytes themselves. Never put them into a message, an argument or an environment."""
        return self._value

    def reveal_text(self) -> str:
        """The value as UTF-8 text."""
        return self._value.decode()

    def __repr__(self) -> str:
        return f"Secret({REDACTED})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return REDACTED

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(("Secret", len(self._value)))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not picklable: hand it over with tensorserve.handoff")


def redact_uri(uri: str) -> str:
    """``uri`` without what may be secret in it: user info, query (signatures) and fragment."""
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https", "s3"}:
        return uri
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{REDACTED}@{host}" if "@" in parts.netloc else host
    return urlunsplit((parts.scheme, netloc, parts.path, REDACTED if parts.query else "", ""))
