"""How are ranges read over HTTP(S): pooled, resumed, bound to one version, with stall detection?

S3 uses the same source with a Signer (s3.py).
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_uri
from tensorserve.sources.base import (
    Access,
    CountingObserver,
    FetchObserver,
    ForbiddenError,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    Source,
    Unobserved,
)
from tensorserve.sources.curl import curl
from tensorserve.sources.curl_transport import CurlTransport
from tensorserve.sources.http_body import asks_for_a_password
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TRANSIENT, Attempts, TryAgain, transient
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.ssrf_guard import host_and_port
from tensorserve.sources.transport import Answer, Expected, Reply, Request, Transport, Verdict
from tensorserve.sources.tuning import DEFAULTS
from tensorserve.sources.urllib_transport import UrllibTransport

# 18 digits: an exbibyte, and no number that int() refuses.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# What an address that was redirected to says when its signature has expired.
_MOVED_AWAY = frozenset({400, 401, 403, 404, 410})


class Signer(Protocol):
    """Signs requests and explains refusals. Each attempt is signed anew."""

    @property
    def generation(self) -> int:
        """The number of renewals of the credentials, which identifies those in use."""

    def sign(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """The headers to send for a GET of `url`."""

    def refresh(self, refused: int) -> bool:
        """Gets credentials newer than the generation `refused`; False if there are none.

        Many ranges are refused at the same time: the first call renews, the others reuse the
        result.
        """

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """A more precise error than the status gives (TryAgain for a transient one), or None."""


class HttpSource(Source):
    """One object behind an HTTP(S) URL."""

    remote = True
    long_requests = True

    def __init__(
        self,
        url: str,
        access: Access,
        observer: FetchObserver | None = None,
        *,
        signer: Signer | None = None,
        name: str | None = None,
        ca_bundle: str | None = None,
        proxies: ProxyRule | None = None,
        keeps_redirects: bool = False,
    ) -> None:
        """Opens the object: reads its size, version and first bytes.

        `ca_bundle`: a file of trusted CAs, instead of the system's. `proxies`: by default from the
        environment. With a `signer`, the path of `url` is not normalised. `keeps_redirects`:
        further requests go where the first was redirected to, until that is refused. Raises
        NotFoundError, ForbiddenError, PermissionDeniedError, SourceUnavailableError or
        ConfigurationError.
        """
        hold_back()
        host_and_port(url, name or "The model's address")
        self._url, self._authorization = _without_user_info(url)
        self._origin = _origin(self._url)
        self.name = name or redact_uri(url)
        self._access = access
        self._policy: RetryPolicy = access.policy
        self._observer = observer or Unobserved()
        self._signer = signer
        self._transport = _transport(
            access, ca_bundle, proxies or ProxyRule(), self.name, self._observer
        )
        self.transport = self._transport.name
        self.library = self._transport.library
        self._keeps_redirects = keeps_redirects
        self._moved_to: str | None = None
        self.size = -1
        self.version: str | None = None
        self.pinned = False
        self._etag: str | None = None
        self._modified: str | None = None
        self._head = b""
        self._open()

    # The methods of `Source` ---------------------------------------------------------------------

    def read_parts(self, offset: int, parts: Filling) -> None:
        """In one request, resumed where a connection broke, bound to one version."""
        stop = self.end_of(offset, parts)
        if stop <= len(self._head):
            parts.take(self._head[offset:stop])
        else:
            self._fetch(offset, stop, parts)

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """See `Source`: the first bytes, kept from the opening, may be damaged as well."""
        filling = Filling.of(buffer)
        stop = self.end_of(offset, filling)
        if len(buffer):
            self._fetch(offset, stop, filling)

    def hurry(self, thread: int) -> None:
        """See `Source`: ends the connection that `thread` reads, which resumes with a new one."""
        self._transport.hurry(thread)

    def close(self) -> None:
        """Closes all connections."""
        self._transport.close()

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
        """Reads size, version and first bytes with one ranged GET: presigned URLs allow no HEAD."""
        attempts = Attempts(self._policy, self._observer, self.name)
        while True:
            head = bytearray()
            try:
                self._get(
                    (0, DEFAULTS.head_bytes - 1),
                    partial(self._learn, head),
                    attempts,
                    pinned=False,
                )
            except TryAgain as cause:
                attempts.failed(cause)
            else:
                self._head = bytes(head)
                return

    def _learn(self, head: bytearray, answer: Answer) -> Filling:
        """Takes what the first answer says; its body, the first bytes, goes to `head`."""
        if answer.status == 416:  # an empty object has no range
            if answer.headers.get("Content-Range", "bytes */0") != "bytes */0":
                raise TryAgain("wrong_range", "the server refuses the first bytes of the object")
            self.size = 0
            return Filling.of(memoryview(head))
        if answer.status == 200:
            # The server ignores Range. The answer is still usable if it is a whole small file.
            length = answer.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > 18 or int(length) > DEFAULTS.head_bytes:
                raise SourceUnavailableError(
                    f"{self.name}: the server does not serve ranges (it answered 200 to one).",
                    hint="tensorserve reads ranges. Serve the model with nginx, S3, or another "
                    "server that supports them, and check whether a proxy removes the header.",
                )
            self.size, count = int(length), int(length)
        else:
            first, last, self.size = _content_range(answer)
            count = last - first + 1
            if first != 0 or count != min(DEFAULTS.head_bytes, self.size):
                raise TryAgain("wrong_range", "the server sent another range than was asked for")
        self._etag = answer.headers.get("ETag")
        self._modified = answer.headers.get("Last-Modified")
        # A weak ETag does not promise equal bytes (RFC 9110, 8.8.1).
        self.pinned = self._has_strong_etag()
        self.version = self._etag if self.pinned else self._modified
        head.extend(bytes(count))
        return Filling.of(memoryview(head))

    def _attempt(self, offset: int, stop: int, filling: Filling, attempts: Attempts) -> None:
        def checked(answer: Answer) -> Filling:
            self._check_range(answer, offset, stop)
            return filling

        expected = None
        if self._etag and self._has_strong_etag():
            content_range = f"bytes {offset}-{stop - 1}/{self.size}"
            expected = Expected(content_range, self._etag, stop - offset, filling)
        self._get((offset, stop - 1), checked, attempts, pinned=True, expected=expected)

    def _check_range(self, answer: Answer, offset: int, stop: int) -> None:
        """Raises unless `answer` is that range of this version."""
        if answer.status != 206:
            raise SourceUnavailableError(
                f"{self.name}: the server answered {answer.status} to a request for a range, "
                "not 206; the answer is not used.",
                hint="Check whether a proxy between here and the source removes the Range header.",
            )
        first, last, size = _content_range(answer)
        if size != self.size:
            raise self._replaced()
        if (first, last) != (offset, stop - 1):
            raise TryAgain("wrong_range", "the server sent another range than was asked for")
        self._same_version(answer)

    def _get(
        self,
        bounds: tuple[int, int],
        take: Callable[[Answer], Filling],
        attempts: Attempts,
        *,
        pinned: bool,
        expected: Expected | None = None,
    ) -> None:
        """A GET of bytes [first, last], redirects followed. TryAgain for transient errors.

        `take` says where the body of an answer goes, which keeps the progress if TryAgain is
        raised.
        """

        def judge(answer: Answer) -> tuple[Verdict, Filling | None]:
            if _is_redirect(answer):
                # S3 redirects for another region; the signature is invalid there.
                return (Verdict.COLLECT if self._signer else Verdict.DROP), None
            if answer.status in {200, 206, 416}:
                self._check_stored(answer)
                return Verdict.TAKE, take(answer)
            # The body of a transient error has no further information.
            return (Verdict.DROP if answer.status in TRANSIENT else Verdict.COLLECT), None

        def received(count: int) -> None:
            if not self._transport.counts:
                self._observer.received(count)
            attempts.progressed(count)

        known = self._moved_to
        url = known or self._url
        for _ in range(DEFAULTS.most_redirects + 1):
            if url not in {self._url, known}:
                host_and_port(url, f"{self.name}: what it redirects to")
            headers, generation = self._headers(url, bounds, pinned=pinned)
            self._observer.request()
            reply = self._transport.get(
                Request(url, headers, self._signer is not None, judge, received, expected)
            )
            answer = reply.answer
            if answer is None or answer.status in {200, 206, 416}:
                if self._keeps_redirects and url != self._url:
                    self._moved_to = url
                return
            if not _is_redirect(answer):
                if url == known and answer.status in _MOVED_AWAY:
                    self._moved_to = None
                    raise TryAgain("moved", "a signed address expired", after=0.0)
                raise self._refusal(answer, reply, generation)
            if self._signer:
                explained = self._signer.explain(answer.status, answer.headers, reply.document)
                if explained is not None:
                    raise explained
            url = _redirected(url, answer.headers["Location"], self.name)
        raise SourceUnavailableError(
            f"{self.name}: more than {DEFAULTS.most_redirects} redirects.",
            hint="Give the final URL.",
        )

    def _headers(
        self, url: str, bounds: tuple[int, int], *, pinned: bool
    ) -> tuple[Mapping[str, str], int]:
        """(headers for a GET of the bytes `bounds`, the generation of the credentials)."""
        # The transport adds `Accept-Encoding: identity`. It must not be signed, since proxies
        # change it.
        headers = {"Range": f"bytes={bounds[0]}-{bounds[1]}"}
        if pinned:
            self._pin(headers)
        if (
            url != self._url and _origin(url) != self._origin
        ):  # credentials are sent to this origin only
            return headers, 0
        if self._authorization:
            headers["Authorization"] = self._authorization
        if not self._signer:
            return headers, 0
        generation = self._signer.generation
        return self._signer.sign(url, headers), generation

    def _has_strong_etag(self) -> bool:
        return bool(self._etag) and not str(self._etag).startswith("W/")

    def _pin(self, headers: dict[str, str]) -> None:
        if self._etag and self._has_strong_etag():
            headers["If-Match"] = self._etag
        elif self._modified:
            headers["If-Unmodified-Since"] = self._modified

    def _check_stored(self, answer: Answer) -> None:
        if not self._as_stored(answer):
            raise SourceUnavailableError(
                f"{self.name}: the server sends it as {answer.headers['Content-Encoding']!r}.",
                hint="Switch off the server's compression for .tensors files.",
            )
        if answer.status == 416 and self.size > 0:
            raise self._replaced()

    def _refusal(self, answer: Answer, reply: Reply, generation: int) -> Exception:
        """The error for an answer with another status."""
        error = self._status_error(answer.status, answer.headers, reply.document)
        # An earlier request was allowed, so the session token may have expired since.
        may_pass = self._signer is not None and self.size >= 0 and answer.status != 407
        if may_pass and isinstance(error, PermissionDeniedError):
            return _Refused(generation, error)
        return error

    def _as_stored(self, response: Answer) -> bool:
        """Whether the body has the object's stored bytes, whatever Content-Encoding says.

        S3 returns the Content-Encoding that was set at upload: `aws-chunked` is the transfer coding
        of the upload, which some servers keep, and `gzip` describes the stored bytes. boto3 ignores
        it (httpsession.py: decode_content=False). A body that a proxy compressed has another length
        than the range.
        """
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in {"", "identity"}:
            return True
        if self._signer is None and encoding != "aws-chunked":
            return False
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length", "")
        if not found:  # not a range: the whole object, or an error
            return length.isdecimal()
        return length == str(int(found[2]) - int(found[1]) + 1)

    def _status_error(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        if status == 412:
            return self._replaced()
        explained = self._signer.explain(status, headers, body) if self._signer else None
        if explained is not None:
            return explained
        if status == 407:
            return asks_for_a_password(self.name)
        if status == 401:
            return PermissionDeniedError(
                f"{self.name}: the server asks for credentials (status 401).",
                hint="Add them to the URL: https://user:password@host/path.",
            )
        if status == 403:
            return ForbiddenError(
                f"{self.name}: the server refuses to serve it (status 403); some servers answer so "
                "for missing files.",
                hint="Check the path, whether a presigned URL has expired, and whether credentials "
                "are missing.",
            )
        if status in {404, 410}:
            return NotFoundError(f"{self.name} does not exist (status {status}).")
        if status in TRANSIENT:
            return transient(status, headers)
        return SourceUnavailableError(f"{self.name}: the server answers {status}.")

    def _renew(self, refused: _Refused, attempts: Attempts) -> None:
        """Raises TryAgain after a renewal of the credentials, else the refusal itself."""
        assert self._signer is not None
        if not attempts.may_renew() or not self._signer.refresh(refused.generation):
            raise refused.error from None
        raise TryAgain("expired", "the credentials expired", after=0.0)

    def _same_version(self, response: Answer) -> None:
        """Checks that this response has the version of the open, also without a precondition."""
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


def open_object(uri: str, access: Access, observer: FetchObserver | None) -> HttpSource:
    """Opens an http(s):// URL. Raises the sources' errors."""
    return HttpSource(uri, access, observer)


def list_objects(_uri: str, _access: Access) -> None:
    """A web server has no list of its files that all of them would give alike."""


class _Refused(Exception):
    """Credentials of this generation were refused although an earlier request was allowed."""

    def __init__(self, generation: int, error: PermissionDeniedError) -> None:
        super().__init__(error.message)
        self.generation = generation
        self.error = error


def _transport(
    access: Access, ca_bundle: str | None, rule: ProxyRule, source: str, observer: FetchObserver
) -> Transport:
    found = curl()
    if found is None:
        return UrllibTransport(access, ca_bundle, rule, source)
    counter = observer.counter if isinstance(observer, CountingObserver) else None
    return CurlTransport(found, access, ca_bundle, rule, source, counter)


def _is_redirect(answer: Answer) -> bool:
    return answer.status in _REDIRECTS and bool(answer.headers.get("Location"))


def _content_range(answer: Answer) -> tuple[int, int, int]:
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if not match:
        raise TryAgain("wrong_range", "the server gives no usable Content-Range")
    return int(match[1]), int(match[2]), int(match[3])


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
        raise ConfigurationError(f"{name}: redirects to an invalid URL.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigurationError(f"{name}: redirects to {parts.scheme!r}, which is not HTTP.")
    if urlsplit(url).scheme == "https" and parts.scheme == "http":
        raise ConfigurationError(
            f"{name}: redirects from https to plain http ({parts.hostname}).",
            hint="Give the https URL of the final location.",
        )
    return target
