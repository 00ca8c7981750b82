"""What comes off the wire: bodies without copies or waiting, and failures said as what they are."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
    ReadTimeoutError,
    SSLError,
)

from tensorserve.errors import SourceUnavailableError
from tensorserve.sources import tls
from tensorserve.sources.retry import TryAgain

# Of an error document; S3's are a few hundred bytes.
MAX_ERROR_BODY = 64 * 1024
# Received in one call: large enough that Python's share is small, small enough that the rate of a
# slow connection (10 MB/s: 25 ms) can be seen from outside.
_AT_ONCE = 256 * 1024


class Closing:
    """Gives the connection back if the body was read to its end, else closes it."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        # We read past urllib3's own accounting: http.client knows whether the body is finished.
        raw = getattr(self._response, "_fp", None)
        if raw is None or not raw.isclosed():
            self._response.close()
        self._response.release_conn()


class Body:
    """The body of one response, read straight into the caller's memory.

    urllib3's readinto makes a copy, and http.client's waits until the buffer is full: a stall would
    lose what came before it, and a trickle would never be seen. So the socket is read here, and
    http.client's own count kept right, by which it knows when the connection is free again.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse, seconds: float) -> None:
        """`seconds`: `fill` returns after them with what has come."""
        self._response = response
        self._seconds = seconds
        raw = getattr(response, "_fp", None)
        counted = isinstance(raw, HTTPResponse) and not raw.chunked and raw.length is not None
        self._raw: HTTPResponse | None = raw if counted else None
        self._receive: Callable[[memoryview], int] | None = None
        self._socket = _socket_below(raw) if isinstance(raw, HTTPResponse) else None
        self.broken_off = False
        """Whether `break_off` was called."""

    def break_off(self) -> None:
        """End the connection, from another thread: a `fill` that waits gives what has come."""
        if self._socket is not None:
            self.broken_off = True
            with suppress(OSError):
                # Not SSLSocket's own: it would pull TLS away from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def fill(self, buffer: memoryview) -> int:
        """Fill `buffer` as far as the body goes, or time; gives the bytes, 0 at the end.

        Raises urllib3's errors and OSError.
        """
        raw = self._raw
        if raw is None:
            data = self._response.read1(len(buffer), decode_content=False)
            buffer[: len(data)] = data
            return len(data)
        if raw.fp is None or not raw.length:
            return 0
        wanted = buffer[: raw.length]
        if self._receive is not None:
            count = self._receive(wanted)
        else:
            count = raw.fp.readinto1(wanted)
            if count < len(wanted):
                # What came along with the header is used up: from here on it is the socket alone.
                self._receive = _receiver(self._socket, self._seconds)
        raw.length -= count
        if not raw.length or not count:
            raw.close()  # frees the connection for the next request
        return int(count)


def _receiver(found: socket.socket | None, seconds: float) -> Callable[[memoryview], int] | None:
    """What reads the socket below a response, as long as it is one of Python's own."""
    if type(found) is socket.socket:
        _wait_in_kernel(found, seconds)
        return partial(_receive_plain, found)
    if type(found) is ssl.SSLSocket:
        return tls.receiver(found, seconds, _AT_ONCE)
    return None


def _socket_below(raw: HTTPResponse) -> socket.socket | None:
    found = getattr(getattr(raw.fp, "raw", None), "_sock", None)
    return found if isinstance(found, socket.socket) else None


def _receive_plain(plain: socket.socket, wanted: memoryview) -> int:
    # The kernel waits for all of it: one call for many packets, instead of one, with Python's lock,
    # for each. SO_RCVTIMEO ends it with what has come.
    count = min(len(wanted), _AT_ONCE)
    try:
        return plain.recv_into(wanted, count, socket.MSG_WAITALL)
    except BlockingIOError as error:
        raise TimeoutError("nothing came in time") from error


def _wait_in_kernel(plain: socket.socket, seconds: float) -> None:
    whole = int(seconds)
    plain.setsockopt(
        socket.SOL_SOCKET,
        socket.SO_RCVTIMEO,
        struct.pack("@ll", whole, int((seconds - whole) * 1e6) + 1),
    )
    # Python's own timeout would make the socket non-blocking. urllib3 sets it again for the next
    # request on this connection.
    plain.settimeout(None)


def read_error_body(response: urllib3.BaseHTTPResponse, seconds: float) -> bytes:
    """The document that explains a refusal, at most MAX_ERROR_BODY bytes of it.

    Raises TryAgain if it breaks off or takes longer than `seconds`: half of it may lack the code.
    """
    body = bytearray(MAX_ERROR_BODY)
    view = memoryview(body)
    promised = response.headers.get("Content-Length", "")
    whole = int(promised) if promised.isdecimal() and len(promised) < 19 else 0
    done = 0
    until = time.monotonic() + seconds
    text = Body(response, seconds)
    while done < len(body):
        count = text.fill(view[done:])
        if not count:
            break
        done += count
        if time.monotonic() > until:
            raise TryAgain("stall", "an error's own text takes too long")
    if done < min(whole, len(body)):
        raise TryAgain("short_body", "the connection ended within an error's own text")
    return bytes(view[:done])


def as_passing(error: HTTPError | OSError, url: str, name: str, stall_timeout: float) -> TryAgain:
    """What went wrong on the way to `url`. SourceUnavailableError if that does not pass (TLS)."""
    host = urlsplit(url).netloc.rpartition("@")[2]
    if isinstance(error, SSLError | ssl.SSLError):
        # urllib3 wraps the error of the handshake, not those of reading.
        cause = error.args[0] if isinstance(error, SSLError) and error.args else error
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return TryAgain("tls", f"{host} broke the connection within TLS")
        # What TLS was agreed upon for came damaged: a bit that flipped on the way.
        if cause is error or "BAD_RECORD_MAC" in (getattr(cause, "reason", None) or ""):
            return TryAgain("tls", f"what came from {host} within TLS was damaged")
        raise SourceUnavailableError(
            f"{name}: TLS with {host} failed: {error}.",
            hint="Is it a private CA? Name its bundle in AWS_CA_BUNDLE (S3) or SSL_CERT_FILE.",
        ) from error
    if isinstance(error, NameResolutionError):
        return TryAgain("dns", f"the name of {host} cannot be resolved")
    # NewConnectionError is a ConnectTimeoutError to urllib3: asked first.
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


def _reason(error: BaseException) -> str:
    text = str(error)
    return "connection refused" if "refused" in text else text.rpartition(": ")[2]
