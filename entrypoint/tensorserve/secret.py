"""How are secret values kept out of logs, messages and pickles?"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import NoReturn

REDACTED = "***"
_QUERY = re.compile(r"[?#]")
# Up to white space or a quote, which end a URL in a program's output.
_USER_INFO = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)[^\s"'<>?#]*@""")

# In the headers and the query of a signed request.
_SIGNATURE = re.compile(
    r"((?:Credential|Signature|AccountKey|X-Amz-Security-Token|X-Amz-Credential|X-Amz-Signature|sig)"
    r"(?:=|%3D|['\"]?: ?b?['\"]))[^\s,&'\"]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?|CONNECTION_STRING|IDENTITY_HEADER)(_ID)?$"
)
_SHORTEST = 6  # characters
# A user and a password have no place in these, so that "@" and ":" are characters of a name.
_STORES = frozenset({"s3", "gs", "az", "hf"})


class Secret:
    """Bytes that print as ``***``, compare in constant time, and refuse to be pickled.

    ``origin`` says where the value came from ("TENSORSERVE_KEY_FILE=/run/secrets/k"), for messages.
    """

    __slots__ = ("_value", "origin")

    def __init__(self, value: bytes | str, origin: str = "") -> None:
        # Python decodes invalid UTF-8 in the environment to surrogates; this reverses it.
        if isinstance(value, str):
            value = value.encode(errors="surrogateescape")
        self._value = bytes(value)
        self.origin = origin

    def reveal(self) -> bytes:
        """The secret bytes. Never put them into a message, an argument or an environment."""
        return self._value

    def reveal_text(self) -> str:
        """The value as UTF-8 text; invalid bytes become lone surrogates."""
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
        raise TypeError("a Secret is not picklable: pass it with tensorserve.launch.handoff")


def redact_uri(uri: str) -> str:
    """``uri`` without its possibly secret parts: user info, query (signatures) and fragment.

    Accepts any text. A password may contain a "/", which would end the host inside the password:
    if an "@" follows a ":", everything before the "@" counts as user info.
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
    if "@" in authority or (at and ":" in before and scheme.lower() not in _STORES):
        place = f"{REDACTED}@{place[len(before) + 1 :]}"
    mark = "" if query is None or query[0] == "#" else f"?{REDACTED}"
    return f"{scheme}://{place}{mark}"


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """`text`, such as a traceback, without signatures and without secret values of `environ`.

    A variable is secret if its name says so (KEY, TOKEN, …). Values below 6 characters are kept.
    """
    text = redact_text(_SIGNATURE.sub(rf"\1{REDACTED}", text))
    values = {value.strip() for name, value in environ.items() if _SECRET_NAME.search(name)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, REDACTED).replace(repr(value)[1:-1], REDACTED)
    return text


def redact_text(text: str) -> str:
    """``text`` without the user info of the URLs in it."""
    return _USER_INFO.sub(rf"\1{REDACTED}@", text)
