"""A value that must not be shown: held as bytes, revealed only when asked by name."""

from __future__ import annotations

import hmac
import re
from typing import NoReturn

REDACTED = "***"
_QUERY = re.compile(r"[?#]")
# As far as white space or a quote: what a program prints around a URL.
_USER_INFO = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)[^\s"'<>?#]*@""")


class Secret:
    """Bytes that print as ``***``, compare in constant time, and refuse to be pickled.

    ``origin`` says where the value came from ("TENSORSERVE_KEY_FILE=/run/secrets/k"), for messages.
    """

    __slots__ = ("_value", "origin")

    def __init__(self, value: bytes | str, origin: str = "") -> None:
        # As Python hands on bytes of an environment that are not UTF-8, and back.
        if isinstance(value, str):
            value = value.encode(errors="surrogateescape")
        self._value = bytes(value)
        self.origin = origin

    def reveal(self) -> bytes:
        """The bytes themselves. Never put them into a message, an argument or an environment."""
        return self._value

    def reveal_text(self) -> str:
        """The value as UTF-8 text; bytes that are none become lone surrogates."""
        return self._value.decode(errors="surrogateescape")

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
    """``uri`` without what may be secret in it: user info, query (signatures) and fragment.

    Any text may be given. A password with a "/" in it ends the host in the middle of the password:
    where an "@" follows a ":", all that stands before it is taken for user info.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme.lower() == "file":  # "?" and "#" are characters of a name here
        host, slash, path = rest.partition("/")
        return (
            f"{scheme}://{REDACTED}@{host.rpartition('@')[2]}{slash}{path}" if "@" in host else uri
        )
    place, query = _QUERY.split(rest, maxsplit=1)[0], _QUERY.search(rest)
    authority = place.partition("/")[0]
    before, at, _ = place.rpartition("@")
    if "@" in authority or (at and ":" in before and scheme.lower() != "s3"):
        place = f"{REDACTED}@{place[len(before) + 1 :]}"
    mark = "" if query is None or query[0] == "#" else f"?{REDACTED}"
    return f"{scheme}://{place}{mark}"


def redact_text(text: str) -> str:
    """``text`` without the user info of the URLs in it."""
    return _USER_INFO.sub(rf"\1{REDACTED}@", text)
