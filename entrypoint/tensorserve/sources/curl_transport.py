"""How are requests sent by libcurl: each in one call of C, which receives the whole range?"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from http.client import HTTPException, parse_headers
from io import BytesIO
from urllib.parse import urlsplit

from urllib3 import HTTPHeaderDict
from urllib3.exceptions import HTTPError, ProxyError

from tensorserve.sources.base import Access
from tensorserve.sources.curl import Callback, Curl, Handle, Job, cipher_suites, trusted
from tensorserve.sources.curl_errors import End, as_told, took_too_long
from tensorserve.sources.header_timeout import dial
from tensorserve.sources.http_body import as_passing, invalid_header, tunnel_refusal
from tensorserve.sources.library_logs import REQUESTS
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.routes import Route, Routes, target
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.transport import Answer, Reply, Request, Verdict
from tensorserve.sources.tuning import DEFAULTS
from tensorserve.version import __version__

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HEADER_BYTES = 32 * 1024
_SECOND = 10**9
_KEPT_LINES = 32
# Some servers refuse requests without one.
_USER_AGENT = f"User-Agent: tensorserve/{__version__}".encode()
# Python handles signals between two of its own steps: in the main thread a call of C makes one.
_TICK = _SECOND // 10


class CurlTransport:
    """See `Transport`. Each connection is a handle of libcurl, which one thread uses at a time."""

    name = "libcurl"

    def __init__(
        self,
        found: Curl,
        access: Access,
        ca_bundle: str | None,
        rule: ProxyRule,
        source: str,
        counter: Callable[[], ctypes.c_int64] | None = None,
    ) -> None:
        """`source`: the source's name, for messages. `counter` makes one that bytes are added to as
        they come; for each connection, which is used by one thread at a time.
        """
        self.counts = counter is not None
        self.library = found.version
        self._counter = counter
        self._curl = found
        self._access = access
        self._ca_bundle = ca_bundle
        self._source = source
        self._routes = Routes(access, rule)
        self._idle: dict[tuple[object, ...], list[_Connection]] = {}
        self._running: dict[int, list[_Connection]] = {}
        """By thread: a callback for a full part may read another range in the same thread."""
        self._closed = False
        self._lock = threading.Lock()

    def get(self, request: Request) -> Reply:
        """See `Transport`."""
        route, thread = self._routes.route(request.url), threading.get_ident()
        with self._lock:
            idle = self._idle.get(route.place)
            connection = idle.pop() if idle else None
            if connection is not None:
                self._begin(connection, thread)
        if connection is None:
            connection = self._new(route)
            with self._lock:
                self._begin(connection, thread)
        try:
            return connection.get(request)
        finally:
            self._back(connection, route, thread)

    def hurry(self, thread: int) -> None:
        """See `Transport`."""
        with self._lock:
            for connection in self._running.get(thread, [])[-1:]:
                connection.break_off()

    def close(self) -> None:
        """See `Transport`. Connections in use are closed as they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _begin(self, connection: _Connection, thread: int) -> None:
        connection.begin()
        self._running.setdefault(thread, []).append(connection)

    def _back(self, connection: _Connection, route: Route, thread: int) -> None:
        """`thread` is done with a connection."""
        with self._lock:
            running = self._running[thread]
            running.remove(connection)
            if not running:
                del self._running[thread]
            keep = not self._closed
            if keep:
                self._idle.setdefault(route.place, []).append(connection)
        if not keep:
            connection.close()

    def _new(self, route: Route) -> _Connection:
        tls = route.scheme == "https" or (
            route.proxy is not None and route.proxy.url.startswith("https:")
        )
        store = trusted(self._ca_bundle) if tls else None
        made = _Connection(self._curl, self._routes, route, self._access, store, self._source)
        if self._counter is not None:
            made.count_with(self._counter())
        return made


class _Connection:
    """A handle of libcurl for one route. One thread uses it at a time."""

    def __init__(
        self,
        found: Curl,
        routes: Routes,
        route: Route,
        access: Access,
        store: int | None,
        source: str,
    ) -> None:
        self._curl = found
        self._routes = routes
        self._route = route
        self._policy = access.policy
        self._source = source
        self._handle = Handle()
        self._head = ctypes.create_string_buffer(_HEADER_BYTES)
        self._job = Job(
            head=ctypes.addressof(self._head),
            head_size=_HEADER_BYTES,
            stall=int(self._policy.stall_timeout * _SECOND),
            connect=int(self._policy.connect_timeout * _SECOND),
            minimum_rate=self._policy.minimum_rate,
            judge=Callback(self._guarded(self._judge, Verdict.DROP)),
            next=Callback(self._guarded(self._next, 1)),
            dial=Callback(self._guarded(self._dial, -1)),
            ticked=Callback(self._guarded(lambda: 0, 1)),
        )
        self._request: Request | None = None
        self._answer: Answer | None = None
        self._filling: Filling | None = None
        self._memory: ctypes.Array[ctypes.c_ubyte] | None = None
        self._document: ctypes.Array[ctypes.c_char] | None = None
        self._error: BaseException | None = None
        self._counter: ctypes.c_int64 | None = None
        self._latest: tuple[tuple[str, bool], bytes] | None = None
        """What the last request's target was made of, and that one."""
        self._lines: dict[tuple[str, str], bytes] = {}
        """Header lines that were checked: most of them come with each request."""
        self._pid = os.getpid()
        self._open(store)

    def count_with(self, counter: ctypes.c_int64) -> None:
        """Add received bytes to `counter`."""
        self._counter = counter
        self._job.counter = ctypes.addressof(counter)

    def begin(self) -> None:
        """The next call may be broken off."""
        self._handle.broken_off = 0

    def break_off(self) -> None:
        """By another thread: end the call that is running."""
        self._curl.break_off(ctypes.byref(self._handle))

    def close(self) -> None:
        """Close the connection. May be called twice."""
        # A forked child has the same socket: it must not say goodbye on it.
        if self._handle.easy and os.getpid() == self._pid:
            self._curl.close(ctypes.byref(self._handle))

    def __del__(self) -> None:
        # Where a source was not closed. Only what is whole has a handle.
        if hasattr(self, "_pid"):
            self.close()

    def get(self, request: Request) -> Reply:
        """See `Transport`."""
        job, url = self._job, request.url
        self._request, self._answer, self._error = request, None, None
        self._filling = None if request.expected is None else request.expected.filling
        job.target = self._target(url, as_written=request.as_written)
        headers = [self._header(name, value) for name, value in request.headers.items()]
        if not any(line[:11].lower() == b"user-agent:" for line in headers):
            headers.append(_USER_AGENT)
        # As http.client says it. `Accept:` has libcurl leave its own out.
        lines = (ctypes.c_char_p * (len(headers) + 3))(
            *headers, b"Accept-Encoding: identity", b"Accept:", None
        )
        job.headers = ctypes.addressof(lines)
        if request.expected is None:
            job.content_range = job.etag = None
        else:
            job.content_range = request.expected.content_range.encode("latin-1")
            job.etag = request.expected.etag.encode("latin-1")
            job.wanted = request.expected.length
        job.tick = _TICK if threading.current_thread() is threading.main_thread() else 0
        self._set_sink(self._filling)
        self._curl.run(ctypes.byref(self._handle), ctypes.byref(job))
        REQUESTS.debug("GET %s: %s", url, job.status or job.message)
        return self._outcome(request)

    # What the call has brought --------------------------------------------------------------------

    def _outcome(self, request: Request) -> Reply:
        job, filling = self._job, self._filling
        self._request = self._filling = None
        try:
            if job.done:
                request.received(job.done)
            if self._error is None and filling is not None:
                self._keep_rest(filling)
                filling.check()
        finally:
            self._memory = None
            error, self._error = self._error, None
        if error is not None:
            raise self._dialled(error)
        if job.judged and job.verdict == Verdict.TAKE:
            if filling is not None and not filling.finished:
                raise self._failure(request)
        elif job.judged and job.verdict == Verdict.COLLECT:
            return Reply(self._answer or Answer(job.status, {}), self._collected(request))
        elif not job.judged:
            raise self._failure(request)
        return Reply(self._answer)

    def _keep_rest(self, filling: Filling) -> None:
        """Of a part that is not full."""
        if self._memory is not None:
            count = len(self._memory) - self._job.room
            self._memory = None
            if count:
                filling.add(count)

    def _collected(self, request: Request) -> bytes:
        """The document that explains a refusal. TryAgain where it broke off: half of it may lack
        the code.
        """
        job = self._job
        found = b"" if self._document is None else self._document.raw[: job.document_length]
        self._document = None
        if job.end == End.BY_CALLBACK or (job.end == End.BY_CURL and not job.code):
            return found
        if job.end == End.BY_CURL and job.code == 18:
            raise TryAgain("short_body", "the connection ended within an error's body")
        raise self._failure(request)

    def _failure(self, request: Request) -> TryAgain:
        """What ended the call. Raises what does not pass."""
        job, proxy = self._job, self._route.proxy
        host = urlsplit(request.url).netloc.rpartition("@")[2]
        if proxy is not None:
            if not job.judged and job.connect_status >= 300:
                said = f"Tunnel connection failed: {job.connect_status}"
                refused = tunnel_refusal(said, self._source, host, proxy.host)
                if isinstance(refused, TryAgain):
                    return refused
                assert refused is not None
                raise refused
            host = f"{host} (through the proxy {proxy.host})"
        if job.end:
            return took_too_long(End(job.end), host, self._policy)
        return as_told(job.code, job.message.decode("utf-8", "replace"), host, self._source)

    def _dialled(self, error: BaseException) -> BaseException:
        """What a callback has raised: errors of the network as those of urllib3."""
        if not isinstance(error, HTTPError | OSError) or self._job.judged:
            return error
        proxy, url = self._route.proxy, f"{self._route.scheme}://{self._netloc()}"
        if proxy is None:
            return as_passing(error, url, self._source, self._policy.stall_timeout)
        wrapped = ProxyError("the proxy was not reached", error)
        return as_passing(wrapped, url, self._source, self._policy.stall_timeout, proxy=proxy.host)

    # What C calls ---------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], int], failed: int) -> Callable[[], int]:
        def call() -> int:
            try:
                return int(work())
            # Raised when C has returned: an exception must not pass through it.
            except BaseException as error:  # noqa: BLE001
                if self._error is None:
                    self._error = error
                return int(failed)

        return call

    def _judge(self) -> int:
        assert self._request is not None
        job = self._job
        self._answer = Answer(job.status, received_headers(self._head.raw[: job.head_length]))
        verdict, filling = self._request.judge(self._answer)
        if verdict is Verdict.COLLECT:
            self._document = ctypes.create_string_buffer(DEFAULTS.most_error_bytes)
            job.document = ctypes.addressof(self._document)
            job.document_size = DEFAULTS.most_error_bytes
        if verdict is not Verdict.TAKE:
            return verdict
        self._filling = filling
        self._set_sink(filling)
        if job.take:
            return Verdict.TAKE
        return Verdict.DROP if self._next() else Verdict.TAKE

    def _next(self) -> int:
        filling = self._filling
        assert filling is not None
        if self._memory is not None:
            count, self._memory = len(self._memory), None
            filling.add(count)
        if filling.finished:
            return 1
        wanted = filling.wanted
        self._memory = (ctypes.c_ubyte * len(wanted)).from_buffer(wanted)
        self._job.out, self._job.room = ctypes.addressof(self._memory), len(wanted)
        return 0

    def _set_sink(self, filling: Filling | None) -> None:
        sink = None if filling is None else filling.sink
        job = self._job
        job.take, job.sink, job.full = (None, None, None) if sink is None else sink

    def _dial(self) -> int:
        route = self._route
        host, port = route.dialled
        addresses = self._routes.addresses(host, port, route.proxy)
        options = [(6, 1, 1)]  # as urllib3: TCP_NODELAY
        made = dial(
            addresses, port, self._policy.connect_timeout, f"{host}:{port}", socket_options=options
        )
        return made.detach()

    # Preparations ---------------------------------------------------------------------------------

    def _open(self, store: int | None) -> None:
        route, proxy = self._route, self._route.proxy
        url = f"{route.scheme}://{self._netloc()}/"
        # libcurl looks names up before it asks for a socket. It gets an address that is not used.
        ports = {route.port, route.dialled[1]}
        resolve = _texts([f"*:{port}:127.0.0.1" for port in ports])
        headers = proxy.headers if proxy is not None else {}
        sent = _texts([f"{name}: {value}" for name, value in headers.items()])
        bad = self._curl.open(
            ctypes.byref(self._handle),
            self._curl.functions,
            url.encode("idna" if not url.isascii() else "ascii"),
            resolve,
            None if proxy is None else proxy.url.encode(),
            int(proxy is not None and proxy.url.startswith("https:")),
            int(route.scheme == "https"),
            sent,
            store,
            None if store is None else cipher_suites() or None,
            DEFAULTS.receive_bytes,
        )
        if bad:
            self.close()
            raise MemoryError("libcurl gives no handle")

    def _netloc(self) -> str:
        host = f"[{self._route.host}]" if ":" in self._route.host else self._route.host
        return f"{host}:{self._route.port}"

    def _header(self, name: str, value: str) -> bytes:
        line = self._lines.get((name, value))
        if line is None:
            # An empty value has to be said with a semicolon: libcurl takes "name:" for a wish to
            # send none.
            line = self._checked(f"{name}: {value}" if value else f"{name};")
            if len(self._lines) >= _KEPT_LINES:
                self._lines.clear()
            self._lines[name, value] = line
        return line

    def _target(self, url: str, *, as_written: bool) -> bytes:
        asked = url, as_written
        if self._latest is None or self._latest[0] != asked:
            text = target(url, self._route.proxy, as_written=as_written)
            self._latest = asked, self._checked(text)
        return self._latest[1]

    def _checked(self, text: str) -> bytes:
        """`text` as bytes. Raises ConfigurationError for line breaks: libcurl would send them."""
        try:
            data = text.encode("latin-1")
        except UnicodeEncodeError:
            raise invalid_header(self._source) from None
        if _CONTROL.search(data):
            raise invalid_header(self._source) from None
        return data


def received_headers(head: bytes) -> HTTPHeaderDict:
    """The fields of a response's header, as http.client and urllib3 read them."""
    first, _, rest = head.partition(b"\n")
    del first
    try:
        message = parse_headers(BytesIO(rest))
    except HTTPException as error:
        raise TryAgain("reset", "the server's header is not HTTP's") from error
    return HTTPHeaderDict(message.items())


def _texts(texts: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*[text.encode() for text in texts], None)
