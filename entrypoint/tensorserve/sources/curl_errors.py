"""What do libcurl's errors mean for a load: is it tried again, or is it final?"""

from __future__ import annotations

import re
from enum import IntEnum

from tensorserve.errors import ConfigurationError, SourceUnavailableError
from tensorserve.sources.base import RetryPolicy
from tensorserve.sources.retry import TryAgain

# CURLcode (curl.h).
_URL_MALFORMAT, _WEIRD_REPLY, _UNSUPPORTED, _CONNECT, _PARTIAL, _OUT_OF_MEMORY = 3, 8, 1, 7, 18, 27
_TLS_CONNECT, _GOT_NOTHING, _SEND, _RECV, _PEER_FAILED = 35, 52, 55, 56, 60
_CHUNKED = 61  # CURLE_BAD_CONTENT_ENCODING

# What breaks a handshake or a record on the way, in OpenSSL's and libcurl's words.
_DAMAGED = re.compile(r"bad record mac", re.IGNORECASE)
_ENDED = re.compile(r"SSL_ERROR_SYSCALL|SSL_ERROR_ZERO_RETURN|unexpected eof", re.IGNORECASE)
_RESET = re.compile(r"reset by peer|broken pipe|errno 104|errno 32", re.IGNORECASE)
_OTHER_NAME = re.compile(
    r"no alternative certificate subject name matches target (\S+ ?\w*) '(.*)'"
)
# libcurl 7 and 8: "SSL certificate problem: certificate has expired",
# "SSL certificate OpenSSL verify result: certificate has expired (10)".
_NOT_TRUSTED = re.compile(r"SSL certificate (?:problem|OpenSSL verify result): (.*?)(?: \(\d+\))?")


class End(IntEnum):
    """Why a call ended: enum end of fetch.c."""

    BY_CURL = 0
    STALLED = 1
    SLOW = 2
    NO_CONNECTION = 3
    BROKEN_OFF = 4
    BY_CALLBACK = 5
    LONG_HEADER = 6
    SLOW_ERROR = 7


def took_too_long(end: End, host: str, policy: RetryPolicy) -> TryAgain:
    """The TryAgain for a request to `host` that fetch.c has ended."""
    if end is End.STALLED:
        return TryAgain("stall", f"{host} sent nothing for {policy.stall_timeout:g} s")
    if end is End.SLOW:
        return TryAgain("stall", "the connection is too slow")
    if end is End.SLOW_ERROR:
        return TryAgain("stall", "an error's body takes too long")
    if end is End.NO_CONNECTION:
        return TryAgain("connect", f"no connection to {host} in time")
    if end is End.BROKEN_OFF:
        return TryAgain("slow", "the range was late", after=0.0)
    if end is End.LONG_HEADER:
        return TryAgain("reset", f"{host} sends a header without end")
    return TryAgain("short_body", "the connection ended before the range did")


def as_told(code: int, message: str, host: str, name: str) -> TryAgain:
    """The TryAgain for libcurl's error `code`, with its `message`.

    Raises SourceUnavailableError for a permanent one (TLS), ConfigurationError for a host that is
    no name.
    """
    if code == _PEER_FAILED:
        raise _tls_failed(f"certificate verify failed: {_why(message)}", host, name)
    if code in {_TLS_CONNECT, _SEND, _RECV} and _DAMAGED.search(message):
        return TryAgain("tls", f"a TLS record from {host} was damaged")
    if code == _TLS_CONNECT:
        if _RESET.search(message):
            return TryAgain("reset", f"{host} broke the connection")
        if _ENDED.search(message):
            return TryAgain("tls", f"{host} broke the connection within TLS")
        raise _tls_failed(message, host, name)
    if code == _URL_MALFORMAT:
        raise ConfigurationError(f"{name}: {host!r} is not a host name.")
    if code in {0, _PARTIAL} or (code == _RECV and _ENDED.search(message)):
        return TryAgain("short_body", "the connection ended before the range did")
    if code == _RECV and "OpenSSL" in message and not _RESET.search(message):
        return TryAgain("tls", f"a TLS record from {host} was damaged")
    if code in {_GOT_NOTHING, _SEND, _RECV, _WEIRD_REPLY, _UNSUPPORTED, _CHUNKED}:
        return TryAgain("reset", f"{host} broke the connection")
    if code == _CONNECT:
        return TryAgain("connect", f"no connection to {host}")
    return TryAgain("transport", f"{host}: {message or f'libcurl error {code}'}")


def _tls_failed(why: str, host: str, name: str) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"{name}: TLS with {host} failed: {why}.",
        hint="For a private CA, set AWS_CA_BUNDLE (S3) or SSL_CERT_FILE to its bundle.",
    )


def _why(message: str) -> str:
    """In the words of Python's ssl, which people know and search for."""
    found = _OTHER_NAME.search(message)
    if found is None:
        told = _NOT_TRUSTED.fullmatch(message)
        return message if told is None else told[1]
    what = "IP address" if ":" in found[2] or found[2].replace(".", "").isdecimal() else "Hostname"
    return f"{what} mismatch, certificate is not valid for '{found[2]}'"
