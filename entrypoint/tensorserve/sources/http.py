"""Ranges over HTTP(S): pooled, resumed, bound to one version, watched. S3 signs on top of it."""

from __future__ import annotations

import re
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

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

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_uri
from tensorserve.sources.addresses import refuse_metadata
from tensorserve.sources.base import Access, FetchObserver, NotFoundError, RetryPolicy, Unobserved
from tensorserve.sources.retry import Attempts, TryAgain, retry_after

# Read at open: enough for the header and the index's length, and often for a whole small file.
HEAD_BYTES = 64 * 1024
MAX_REDIRECTS = 5
# 256 KiB a read: large enough that Python's share is small, small enough that the watchdog sees.
_STEP = 256 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509})


class Signer(Protocol):
    """Adds what a request needs to be allowed. Called for every attempt, so never stale."""

    def sign(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """The headers to send for a GET of `url`."""

    def refresh(self) -> bool:
        """Get new credentials after a refusal; False if there is nothing to renew."""

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """A better error than the status alone gives, or None."""


class HttpSource:
    """One object behind an HTTP(S) URL."""

    def __init__(
        self,
        url: str,
        access: Access,
        observer: FetchObserver | None = None,
        *,
        signer: Signer | None = None,
        name: str | None = None,
        ca_bundle: str | None = None,
    ) -> None:
        self._url, self._authorization = _without_user_info(url)
        self._origin = _origin(self._url)
        self.name = name or redact_uri(url)
        self._access = access
        self._policy: RetryPolicy = access.policy
        self._observer = observer or Unobserved()
        self._signer = signer
        self._renewed_at = 0.0
        timeout = urllib3.Timeout(
            connect=self._policy.connect_timeout, read=self._policy.stall_timeout
        )
        self._pool = urllib3.PoolManager(
            maxsize=access.connections,
            block=False,
            retries=False,
            timeout=timeout,
            ca_certs=ca_bundle,
            # blocksize: what http.client reads from the socket at once.
            blocksize=_STEP,
        )
        self.size = -1
        self.version: str | None = None
        self._modified: str | None = None
        self._head = b""
        self._checked_hosts: set[str] = set()
        self._open()

    # What sources do -----------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; resumes where a connection broke, bound to one version."""
        if offset < 0 or offset + len(buffer) > self.size:
            raise CorruptError(
                f"{self.name}: bytes {offset} to {offset + len(buffer)} are beyond its end "
                f"({self.size} bytes)."
            )
        if offset + len(buffer) <= len(self._head):
            buffer[:] = self._head[offset : offset + len(buffer)]
            return
        done = 0
        attempts = Attempts(self._policy, self._observer, self.name)
        while done < len(buffer):
            try:
                done += self._attempt(offset + done, buffer[done:], attempts)
            except _Broken as broken:
                done += broken.done
                attempts.failed(broken.cause)
            except TryAgain as cause:
                attempts.failed(cause)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    # One request ---------------------------------------------------------------------------------

    def _open(self) -> None:
        """Size, version and first bytes, from one ranged GET (a presigned URL allows no HEAD)."""
        attempts = Attempts(self._policy, self._observer, self.name)
        while True:
            try:
                response = self._request(0, HEAD_BYTES - 1, pinned=False)
                with _Closing(response):
                    self._learn(response, attempts)
                return
            except _Broken as broken:
                attempts.failed(broken.cause)
            except TryAgain as cause:
                attempts.failed(cause)

    def _learn(self, response: urllib3.BaseHTTPResponse, attempts: Attempts) -> None:
        if response.status == 416:  # an empty object has no range
            self.size = 0
            return
        if response.status == 200:
            # F4: the server ignores Range. If it is the whole small file, that is an answer too.
            length = response.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > HEAD_BYTES:
                raise SourceUnavailableError(
                    f"{self.name}: the server does not serve ranges (it answered 200 to one).",
                    hint="tensorserve reads ranges. Serve the model with nginx, S3, or another "
                    "server that supports them; a proxy between may be stripping the header.",
                )
            self.size, count = int(length), int(length)
        else:
            first, last, self.size = self._content_range(response)
            count = last - first + 1
            if first != 0 or count != min(HEAD_BYTES, self.size):
                raise TryAgain("wrong_range", "the server sent another range than was asked for")
        etag = response.headers.get("ETag")
        # A weak ETag does not promise equal bytes (RFC 9110, 8.8.1).
        self.version = etag if etag and not etag.startswith("W/") else None
        self._modified = response.headers.get("Last-Modified")
        if self.version is None:
            self.version = self._modified
        head = bytearray(count)
        self._receive(response, memoryview(head), attempts)
        self._head = bytes(head)

    def _attempt(self, offset: int, buffer: memoryview, attempts: Attempts) -> int:
        response = self._request(offset, offset + len(buffer) - 1, pinned=True)
        with _Closing(response):
            if response.status != 206:
                raise SourceUnavailableError(
                    f"{self.name}: the server answered {response.status} to a range; that is the "
                    "whole file or nothing, and is not used as data.",
                    hint="Does a proxy between here and the source strip the Range header?",
                )
            first, last, size = self._content_range(response)
            if size != self.size:
                raise self._replaced()
            if (first, last) != (offset, offset + len(buffer) - 1):
                raise TryAgain("wrong_range", "the server sent another range than was asked for")
            self._same_version(response)
            return self._receive(response, buffer, attempts)

    def _receive(
        self, response: urllib3.BaseHTTPResponse, buffer: memoryview, attempts: Attempts
    ) -> int:
        """The body into `buffer`; _Broken says how much of it came before a failure."""
        done = 0
        window_start, window_bytes = time.monotonic(), 0
        try:
            while done < len(buffer):
                count = _readinto(response, buffer[done : done + _STEP])
                if not count:
                    raise TryAgain("short_body", "the connection ended before the range did")
                done += count
                self._observer.received(count)
                attempts.progressed()
                window_bytes += count
                elapsed = time.monotonic() - window_start
                if elapsed >= self._policy.stall_timeout:
                    if window_bytes < self._policy.minimum_rate * elapsed and done < len(buffer):
                        raise TryAgain("stall", "the connection brings next to nothing")
                    window_start, window_bytes = time.monotonic(), 0
        except TryAgain as cause:
            raise _Broken(done, cause) from cause
        except (HTTPError, OSError) as error:
            raise _Broken(done, self._as_passing(error)) from error
        return done

    def _request(self, first: int, last: int, *, pinned: bool) -> urllib3.BaseHTTPResponse:
        """A GET of bytes [first, last], redirects followed. TryAgain for what may pass."""
        url = self._url
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            if parts.netloc not in self._checked_hosts:
                refuse_metadata(parts.hostname or "", port, self._access.allowed_hosts)
                self._checked_hosts.add(parts.netloc)
            headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
            if pinned:
                self._pin(headers)
            if _origin(url) == self._origin:  # credentials go nowhere else
                if self._authorization:
                    headers["Authorization"] = self._authorization
                if self._signer:
                    headers = dict(self._signer.sign(url, headers))
            self._observer.request()
            try:
                response = self._pool.request(
                    "GET", url, headers=headers, preload_content=False, redirect=False
                )
            except (HTTPError, OSError) as error:
                raise self._as_passing(error) from error
            location = response.headers.get("Location")
            if response.status not in {301, 302, 303, 307, 308} or not location:
                self._check_status(response)
                return response
            with _Closing(response):
                url = _redirected(url, location, self.name)
        raise SourceUnavailableError(
            f"{self.name}: more than {MAX_REDIRECTS} redirects.", hint="Give the final URL."
        )

    def _pin(self, headers: dict[str, str]) -> None:
        if self.version and self.version != self._modified:
            headers["If-Match"] = self.version
        elif self._modified:
            headers["If-Unmodified-Since"] = self._modified

    def _check_status(self, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        if status in {200, 206, 416}:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding not in {"", "identity"}:
                with _Closing(response):
                    raise SourceUnavailableError(
                        f"{self.name}: the server sends it as {encoding!r}.",
                        hint="Switch compression off for .tensors files.",
                    )
            if status == 416 and self.size > 0:
                with _Closing(response):
                    raise self._replaced()
            return
        with _Closing(response):
            body = response.read(64 * 1024, decode_content=False)
            raise self._status_error(status, response.headers, body)

    def _status_error(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        if status == 412:
            return self._replaced()
        explained = self._signer.explain(status, headers, body) if self._signer else None
        expired = status == 403 or isinstance(explained, PermissionDeniedError)
        if expired and self.size >= 0 and self._renew():
            # F5: it was allowed before; a session ran out in the middle.
            return TryAgain("expired", "the credentials expired", after=0.0)
        if explained is not None:
            return explained
        if status in {401, 403}:
            return PermissionDeniedError(
                f"{self.name}: the server refuses to serve it (status {status}).",
                hint="Has a presigned URL expired, or are credentials missing?",
            )
        if status in {404, 410}:
            return NotFoundError(f"{self.name} does not exist (status {status}).")
        if status in _PASSING:
            return TryAgain(
                f"status_{status}",
                f"the server answers {status}",
                after=retry_after(headers.get("Retry-After")),
            )
        return SourceUnavailableError(f"{self.name}: the server answers {status}.")

    def _renew(self) -> bool:
        """New credentials, once in a while: many ranges fail at the same moment."""
        if self._signer is None:
            return False
        if time.monotonic() - self._renewed_at < 5.0:
            return False
        self._renewed_at = time.monotonic()
        return self._signer.refresh()

    def _content_range(self, response: urllib3.BaseHTTPResponse) -> tuple[int, int, int]:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match:
            raise TryAgain("wrong_range", "the server gives no usable Content-Range")
        return int(match[1]), int(match[2]), int(match[3])

    def _same_version(self, response: urllib3.BaseHTTPResponse) -> None:
        if self.version and self.version != self._modified:
            etag = response.headers.get("ETag")
            if etag is not None and etag != self.version:
                raise self._replaced()
        elif self._modified and response.headers.get("Last-Modified") not in {None, self._modified}:
            raise self._replaced()

    def _replaced(self) -> CorruptError:
        return CorruptError(
            f"{self.name} was replaced while it was read.",
            hint="Start again; upload models under a new name instead of over an old one.",
        )

    def _as_passing(self, error: HTTPError | OSError) -> TryAgain:
        """What went wrong on the wire, said as what it is. TLS failures do not pass: raised."""
        host = urlsplit(self._url).netloc
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return TryAgain("reset", f"{host} broke the connection")
        if isinstance(error, SSLError | ssl.SSLError):
            raise SourceUnavailableError(
                f"{self.name}: TLS with {host} failed: {error}.",
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
            return TryAgain("stall", f"{host} sent nothing for {self._policy.stall_timeout:g} s")
        if isinstance(error, IncompleteRead):
            return TryAgain("short_body", "the connection ended before the range did")
        if isinstance(error, ProtocolError | ConnectionError):
            return TryAgain("reset", f"{host} broke the connection")
        return TryAgain("transport", f"{host}: {type(error).__name__}")


class _Broken(Exception):
    """An attempt that failed after `done` bytes."""

    def __init__(self, done: int, cause: TryAgain) -> None:
        super().__init__(cause.message)
        self.done = done
        self.cause = cause


class _Closing:
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


def _readinto(response: urllib3.BaseHTTPResponse, buffer: memoryview) -> int:
    """What has arrived, straight from the socket into `buffer`, without waiting for all of it.

    urllib3's readinto makes a copy, and http.client's waits until the buffer is full: a stall would
    lose what came before it, and a trickle would never be seen. So: one read of the socket's file,
    and http.client's own count kept right, by which it knows when the connection is free again.
    """
    raw = getattr(response, "_fp", None)
    if not isinstance(raw, HTTPResponse) or raw.chunked or raw.length is None:
        data = response.read(len(buffer), decode_content=False)
        buffer[: len(data)] = data
        return len(data)
    if raw.fp is None or not raw.length:
        return 0
    count = raw.fp.readinto1(buffer[: raw.length])
    raw.length -= count
    if not raw.length or not count:
        raw.close()  # frees the connection for the next request
    return int(count)


def _reason(error: BaseException) -> str:
    text = str(error)
    return "connection refused" if "refused" in text else text.rpartition(": ")[2]


def _without_user_info(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return urlunsplit(parts._replace(fragment="")), None
    info, _, host = parts.netloc.rpartition("@")
    token = b64encode(unquote(info).encode()).decode()
    return urlunsplit(parts._replace(netloc=host, fragment="")), f"Basic {token}"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _redirected(url: str, location: str, name: str) -> str:
    target = urljoin(url, location)
    parts = urlsplit(target)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(f"{name}: redirects to {parts.scheme!r}, which is not HTTP.")
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise ConfigurationError(
            f"{name}: redirects from https to plain http ({parts.hostname}).",
            hint="Give an https URL of the final place.",
        )
    return target
