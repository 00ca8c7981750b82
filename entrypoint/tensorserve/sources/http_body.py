"""How is a response's body read by urllib3, and what do transport errors become?"""

from __future__ import annotations

import re
import socket
import ssl
import time
from contextlib import suppress
from http.client import HTTPResponse
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.tuning import DEFAULTS

# http.client's words for what a proxy answers to CONNECT.
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")


class Closing:
    """Returns the connection to its pool if the body was read completely, else closes it."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        # http.client knows whether the body is complete.
        raw = getattr(self._response, "_fp", None)
        if raw is None or not raw.isclosed():
            self._response.close()
        self._response.release_conn()


class Body:
    """The body of one response, as urllib3 reads it.

    Not by its `read` and `readinto`, which wait until the buffer is full: a stall would lose the
    bytes before it, and a slow connection would go unnoticed.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        raw = getattr(response, "_fp", None)
        self._socket = _socket_below(raw) if isinstance(raw, HTTPResponse) else None
        # Memory is taken for as much as is asked for, and TLS gives a record at a time.
        plain = self._socket is not None and not isinstance(self._socket, ssl.SSLSocket)
        self._most = DEFAULTS.receive_bytes if plain else DEFAULTS.record_bytes
        self.broken_off = False
        """Whether `break_off` was called."""

    def break_off(self) -> None:
        """Ends the connection, from another thread. A waiting `fill` ends, too."""
        if self._socket is not None:
            self.broken_off = True
            with suppress(OSError):
                # Not SSLSocket.shutdown, which removes the TLS object that the reader uses.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def fill(self, buffer: memoryview) -> int:
        """Reads into `buffer` what has come; waits for the first byte, as the pool's timeout says.

        Returns the number of bytes, 0 at the body's end. Raises urllib3's errors and OSError.
        """
        wanted = min(len(buffer), self._most)
        try:
            data = self._response.read1(wanted, decode_content=False)
        except (SSLError, ProtocolError) as error:
            # As it was told first: `as_passing` takes urllib3's SSLError for one of the handshake.
            raise _within(error) from error
        buffer[: len(data)] = data
        return len(data)


def _within(error: HTTPError) -> HTTPError | OSError:
    found = error.args[-1] if error.args else None
    return found if isinstance(found, ssl.SSLError | IncompleteRead) else error


def _socket_below(raw: HTTPResponse) -> socket.socket | None:
    found = getattr(getattr(raw.fp, "raw", None), "_sock", None)
    return found if isinstance(found, socket.socket) else None


def read_small_body(
    response: urllib3.BaseHTTPResponse, seconds: float, most: int = DEFAULTS.most_error_bytes
) -> bytes:
    """A document that explains a refusal, or another small one; at most `most` bytes of it.

    Raises TryAgain if it breaks off or takes longer than `seconds`: half of it may lack the code.
    """
    body = bytearray(most)
    view = memoryview(body)
    promised = response.headers.get("Content-Length", "")
    whole = int(promised) if promised.isdecimal() and len(promised) < 19 else 0
    done = 0
    until = time.monotonic() + seconds
    text = Body(response)
    while done < len(body):
        count = text.fill(view[done:])
        if not count:
            break
        done += count
        if time.monotonic() > until:
            raise TryAgain("stall", "an answer takes too long")
    if done < min(whole, len(body)):
        raise TryAgain("short_body", "the connection ended within an answer")
    return bytes(view[:done])


def asks_for_a_password(name: str, proxy: str | None = None) -> PermissionDeniedError:
    """The error for a proxy's status 407."""
    who = f"the proxy {proxy}" if proxy else "a proxy"
    return PermissionDeniedError(
        f"{name}: {who} asks for a user and a password (407).",
        hint="Add them to HTTP_PROXY or HTTPS_PROXY: http://user:password@host:port, with %XX for "
        "special characters.",
    )


def invalid_header(
    name: str,
    hint: str = "Check the credentials (from a profile's file, a role, a provider) and the region.",
) -> ConfigurationError:
    """The error for a header's value that no request can have; the value is not shown."""
    return ConfigurationError(
        f"{name}: a header of the request has an invalid character, such as a line break.",
        hint=hint,
    )


def tunnel_refusal(
    text: str, name: str, host: str, proxy: str | None = None
) -> PermissionDeniedError | TryAgain | None:
    """The error for a proxy's answer to CONNECT in an exception's `text`; None without one."""
    found = _TUNNEL.search(text)
    if found is None:
        return None
    if found[1] == "407":
        return asks_for_a_password(name, proxy)
    who = f"the proxy {proxy}" if proxy else "the proxy"
    if found[1] in {"401", "403", "405"}:
        return PermissionDeniedError(
            f"{name}: {who} does not allow connections to {host} ({found[1]}).",
            hint="Have the proxy allow it, or name the host in NO_PROXY.",
        )
    return TryAgain("proxy", f"{who} answers {found[1]} for {host}")


def as_passing(
    error: HTTPError | OSError,
    url: str,
    name: str,
    stall_timeout: float,
    *,
    proxy: str | None = None,
) -> TryAgain:
    """The TryAgain for a transport error of a request to `url`, through `proxy` (host:port) if any.

    Raises SourceUnavailableError for a permanent one (TLS), PermissionDeniedError if the proxy
    refuses.
    """
    host = urlsplit(url).netloc.rpartition("@")[2]
    if proxy is not None:
        refused = tunnel_refusal(str(error), name, host, proxy)
        if isinstance(refused, TryAgain):
            return refused
        if refused is not None:
            raise refused from error
        if isinstance(error, ProxyError):  # the proxy was not reached
            host, error = f"the proxy {proxy}", _below(error)
        else:
            host = f"{host} (through the proxy {proxy})"
    if isinstance(error, SSLError | ssl.SSLError):
        # urllib3 wraps errors of the handshake, not those of reading.
        cause = error.args[0] if isinstance(error, SSLError) and error.args else error
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return TryAgain("tls", f"{host} broke the connection within TLS")
        # An error after the handshake is a damaged record: a bit flipped in transit.
        if cause is error or "BAD_RECORD_MAC" in (getattr(cause, "reason", None) or ""):
            return TryAgain("tls", f"a TLS record from {host} was damaged")
        raise SourceUnavailableError(
            f"{name}: TLS with {host} failed: {error}.",
            hint="For a private CA, set AWS_CA_BUNDLE (S3) or SSL_CERT_FILE to its bundle.",
        ) from error
    if isinstance(error, NameResolutionError):
        return TryAgain("dns", f"the name of {host} cannot be resolved")
    # Tested first: NewConnectionError is a subclass of ConnectTimeoutError in urllib3.
    if isinstance(error, NewConnectionError):
        return TryAgain("connect", f"no connection to {host}: {_reason(error)}")
    if isinstance(error, ConnectTimeoutError):
        return TryAgain("connect", f"no connection to {host} in time")
    if isinstance(error, ReadTimeoutError | TimeoutError):
        return TryAgain("stall", f"{host} sent nothing for {stall_timeout:g} s")
    if isinstance(error, IncompleteRead):
        return TryAgain("short_body", "the connection ended before the range did")
    if isinstance(error, ProtocolError | ConnectionError):
        return TryAgain("reset", f"{host} broke the connection")
    return TryAgain("transport", f"{host}: {type(error).__name__}")


def _below(error: ProxyError) -> HTTPError | OSError:
    found = error.original_error
    return found if isinstance(found, HTTPError | OSError) else error


def _reason(error: BaseException) -> str:
    text = str(error)
    return "connection refused" if "refused" in text else text.rpartition(": ")[2]
