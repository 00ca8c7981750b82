"""Ranges over HTTP(S): pooled, resumed, bound to one version, watched. S3 signs on top of it."""

from __future__ import annotations

import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_uri
from tensorserve.sources.addresses import host_and_port, resolve
from tensorserve.sources.answers import watch_connections
from tensorserve.sources.base import (
    Access,
    FetchObserver,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    Unobserved,
)
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.parts import Filling, ReadsParts
from tensorserve.sources.retry import Attempts, TryAgain, retry_after
from tensorserve.sources.wire import Body, Closing, as_passing, read_error_body

# Read at open: enough for the header and the index's length, and often for a whole small file.
HEAD_BYTES = 64 * 1024
MAX_REDIRECTS = 5
# 256 KiB a read: large enough that Python's share is small, small enough that the watchdog sees.
_STEP = 256 * 1024
# 18 digits: an exbibyte, and no number that int() refuses.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 509})


class Signer(Protocol):
    """Adds what a request needs to be allowed. Called for every attempt, so never stale."""

    @property
    def generation(self) -> int:
        """Counts renewals: tells which credentials a request was signed with."""

    def sign(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """The headers to send for a GET of `url`."""

    def refresh(self, refused: int) -> bool:
        """Get credentials newer than the generation `refused`; False if there are none.

        Many ranges are refused in the same moment: the first renews, the others use it.
        """

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """A better error than the status alone gives (TryAgain, where it passes), or None."""


class HttpSource(ReadsParts):
    """One object behind an HTTP(S) URL."""

    remote = True

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
        hold_back()
        host_and_port(url, name or "The model's address")
        self._url, self._authorization = _without_user_info(url)
        self._origin = _origin(self._url)
        self.name = name or redact_uri(url)
        self._access = access
        self._policy: RetryPolicy = access.policy
        self._observer = observer or Unobserved()
        self._signer = signer
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
        allowed = access.allowed_hosts
        watch_connections(self._pool, lambda host, port: resolve(host, port, allowed))
        self.size = -1
        self.version: str | None = None
        self.pinned = False
        self._etag: str | None = None
        self._modified: str | None = None
        self._head = b""
        self._bodies: dict[int, Body] = {}
        """That are being read, by thread."""
        self._lock = threading.Lock()
        self._open()

    # What sources do -----------------------------------------------------------------------------

    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """In one request, resumed where a connection broke, bound to one version."""
        filling = Filling(lengths, memory, on_part)
        stop = self.within(offset, filling)
        if stop <= len(self._head):
            filling.take(self._head[offset:stop])
        else:
            self._fetch(offset, stop, filling)

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """See `Source`: the first bytes, kept from the opening, may be damaged as well."""
        filling = Filling.of(buffer)
        stop = self.within(offset, filling)
        if len(buffer):
            self._fetch(offset, stop, filling)

    def hurry(self, thread: int) -> None:
        """See `Source`: what it reads is asked for anew, from where it is."""
        with self._lock:
            if thread in self._bodies:
                self._bodies[thread].break_off()

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    # One request ---------------------------------------------------------------------------------

    def _fetch(self, offset: int, stop: int, filling: Filling) -> None:
        attempts = Attempts(self._policy, self._observer, self.name)
        while not filling.finished:
            try:
                try:
                    self._attempt(offset + filling.done, stop, filling, attempts)
                except _Refused as refused:
                    self._renew(refused, attempts)
            except TryAgain as cause:
                attempts.failed(cause)

    def _open(self) -> None:
        """Size, version and first bytes, from one ranged GET (a presigned URL allows no HEAD)."""
        attempts = Attempts(self._policy, self._observer, self.name)
        while True:
            try:
                response = self._request(0, HEAD_BYTES - 1, pinned=False)
                with Closing(response):
                    self._learn(response, attempts)
                return
            except TryAgain as cause:
                attempts.failed(cause)

    def _learn(self, response: urllib3.BaseHTTPResponse, attempts: Attempts) -> None:
        if response.status == 416:  # an empty object has no range
            if response.headers.get("Content-Range", "bytes */0") != "bytes */0":
                raise TryAgain("wrong_range", "the server refuses the first bytes of the object")
            self.size = 0
            return
        if response.status == 200:
            # F4: the server ignores Range. If it is the whole small file, that is an answer too.
            length = response.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > 18 or int(length) > HEAD_BYTES:
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
        self._etag = response.headers.get("ETag")
        self._modified = response.headers.get("Last-Modified")
        # A weak ETag does not promise equal bytes (RFC 9110, 8.8.1).
        self.pinned = self._has_strong_etag()
        self.version = self._etag if self.pinned else self._modified
        head = bytearray(count)
        self._receive(response, Filling.of(memoryview(head)), attempts)
        self._head = bytes(head)

    def _attempt(self, offset: int, stop: int, filling: Filling, attempts: Attempts) -> None:
        response = self._request(offset, stop - 1, pinned=True)
        with Closing(response):
            if response.status != 206:
                raise SourceUnavailableError(
                    f"{self.name}: the server answered {response.status} to a range; that is the "
                    "whole file or nothing, and is not used as data.",
                    hint="Does a proxy between here and the source strip the Range header?",
                )
            first, last, size = self._content_range(response)
            if size != self.size:
                raise self._replaced()
            if (first, last) != (offset, stop - 1):
                raise TryAgain("wrong_range", "the server sent another range than was asked for")
            self._same_version(response)
            self._receive(response, filling, attempts)

    def _receive(
        self, response: urllib3.BaseHTTPResponse, filling: Filling, attempts: Attempts
    ) -> None:
        """The body into `filling`, which knows how much of it came before a TryAgain."""
        body = Body(response, self._policy.stall_timeout)
        thread = threading.get_ident()
        with self._lock:
            # What is done with a part may be to read something else.
            outer, self._bodies[thread] = self._bodies.get(thread), body
        try:
            self._receive_body(body, response.url or self._url, filling, attempts)
        except TryAgain as cause:
            if body.broken_off:
                raise TryAgain("slow", "it was late", after=0.0) from cause
            raise
        finally:
            with self._lock:
                if outer is None:
                    del self._bodies[thread]
                else:
                    self._bodies[thread] = outer

    def _receive_body(self, body: Body, url: str, filling: Filling, attempts: Attempts) -> None:
        window_start, window_bytes = time.monotonic(), 0
        while not filling.finished:
            # Outside the watchdog's window: waiting for memory is not the network's fault, nor what
            # is done with a full part.
            started = time.monotonic()
            wanted = filling.wanted
            window_start += time.monotonic() - started
            try:
                count = body.fill(wanted)
            except (HTTPError, OSError) as error:
                raise self._as_passing(error, url) from error
            if not count:
                raise TryAgain("short_body", "the connection ended before the range did")
            self._observer.received(count)
            attempts.progressed(count)
            window_bytes += count
            now = time.monotonic()
            elapsed = now - window_start
            slow = elapsed >= self._policy.stall_timeout and (
                window_bytes < self._policy.minimum_rate * elapsed
            )
            last = filling.ends_with(count)
            filling.add(count)
            if slow and not last:
                raise TryAgain("stall", "the connection brings next to nothing")
            if elapsed >= self._policy.stall_timeout:
                window_start, window_bytes = time.monotonic(), 0
            else:
                window_start += time.monotonic() - now

    def _request(self, first: int, last: int, *, pinned: bool) -> urllib3.BaseHTTPResponse:
        """A GET of bytes [first, last], redirects followed. TryAgain for what may pass."""
        url = self._url
        for _ in range(MAX_REDIRECTS + 1):
            host_and_port(url, f"{self.name}: what it redirects to")
            headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
            if pinned:
                self._pin(headers)
            generation = 0
            if _origin(url) == self._origin:  # credentials go nowhere else
                if self._authorization:
                    headers["Authorization"] = self._authorization
                if self._signer:
                    generation = self._signer.generation
                    headers = dict(self._signer.sign(url, headers))
            self._observer.request()
            try:
                response = self._pool.request(
                    "GET", url, headers=headers, preload_content=False, redirect=False
                )
            except (HTTPError, OSError) as error:
                raise self._as_passing(error, url) from error
            location = response.headers.get("Location")
            response.url = url  # urllib3's own lacks the host
            if response.status not in {301, 302, 303, 307, 308} or not location:
                self._check_status(response, url, generation)
                return response
            with Closing(response):
                if self._signer:  # S3 says "another region" so, where no signature of ours is valid
                    body = self._error_body(response, url)
                    explained = self._signer.explain(response.status, response.headers, body)
                    if explained is not None:
                        raise explained
                url = _redirected(url, location, self.name)
        raise SourceUnavailableError(
            f"{self.name}: more than {MAX_REDIRECTS} redirects.", hint="Give the final URL."
        )

    def _has_strong_etag(self) -> bool:
        return bool(self._etag) and not str(self._etag).startswith("W/")

    def _pin(self, headers: dict[str, str]) -> None:
        if self._etag and self._has_strong_etag():
            headers["If-Match"] = self._etag
        elif self._modified:
            headers["If-Unmodified-Since"] = self._modified

    def _check_status(self, response: urllib3.BaseHTTPResponse, url: str, generation: int) -> None:
        status = response.status
        if status in {200, 206, 416}:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding not in {"", "identity"}:
                with Closing(response):
                    raise SourceUnavailableError(
                        f"{self.name}: the server sends it as {encoding!r}.",
                        hint="Switch compression off for .tensors files.",
                    )
            if status == 416 and self.size > 0:
                with Closing(response):
                    raise self._replaced()
            return
        with Closing(response):
            if status in _PASSING:  # the text would tell nothing more
                error: Exception = self._status_error(status, response.headers, b"")
            else:
                body = self._error_body(response, url)
                error = self._status_error(status, response.headers, body)
            # F5: it was allowed before, so a session may have run out in the middle.
            if isinstance(error, PermissionDeniedError) and self._signer and self.size >= 0:
                raise _Refused(generation, error)
            raise error

    def _error_body(self, response: urllib3.BaseHTTPResponse, url: str) -> bytes:
        try:
            return read_error_body(response, self._policy.stall_timeout)
        except (HTTPError, OSError) as error:
            raise self._as_passing(error, url) from error

    def _status_error(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        if status == 412:
            return self._replaced()
        explained = self._signer.explain(status, headers, body) if self._signer else None
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

    def _renew(self, refused: _Refused, attempts: Attempts) -> None:
        """F5: TryAgain with new credentials, or the refusal itself where they are no help."""
        assert self._signer is not None
        if not attempts.may_renew() or not self._signer.refresh(refused.generation):
            raise refused.error from None
        raise TryAgain("expired", "the credentials expired", after=0.0)

    def _content_range(self, response: urllib3.BaseHTTPResponse) -> tuple[int, int, int]:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not match:
            raise TryAgain("wrong_range", "the server gives no usable Content-Range")
        return int(match[1]), int(match[2]), int(match[3])

    def _same_version(self, response: urllib3.BaseHTTPResponse) -> None:
        """What the server says of this range is what it said at open, with precondition or not."""
        expected = {"ETag": self._etag}
        if not self._has_strong_etag():
            expected["Last-Modified"] = self._modified
        for name, value in expected.items():
            found = response.headers.get(name)
            if value is not None and found is None:
                raise TryAgain("no_version", f"a range came without its version ({name})")
            if found != value:
                raise self._replaced()

    def _replaced(self) -> ReplacedError:
        return ReplacedError(
            f"{self.name} was replaced while it was read.",
            hint="Start again; upload models under a new name instead of over an old one.",
        )

    def _as_passing(self, error: HTTPError | OSError, url: str) -> TryAgain:
        return as_passing(error, url, self.name, self._policy.stall_timeout)


class _Refused(Exception):
    """The credentials of this generation were refused in the middle."""

    def __init__(self, generation: int, error: PermissionDeniedError) -> None:
        super().__init__(error.message)
        self.generation = generation
        self.error = error


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
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
    except ValueError as error:
        raise ConfigurationError(f"{name}: redirects to what is not a URL.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(f"{name}: redirects to {parts.scheme!r}, which is not HTTP.")
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise ConfigurationError(
            f"{name}: redirects from https to plain http ({parts.hostname}).",
            hint="Give an https URL of the final place.",
        )
    return target
