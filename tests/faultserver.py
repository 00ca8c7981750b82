"""An HTTP(S) server on 127.0.0.1 that answers as a test says, and passes the rest on to a real one.

For what rangeserver.py cannot show: odd headers, half an error document, and faults in front of a
real S3 server. A request is passed on with its Host as it came, so that a signature stays valid.
"""

from __future__ import annotations

import http.client
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Reply:
    """What to answer. `promised` is the Content-Length where it is to be a lie, -1 for none."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    promised: int | None = None
    trickle_seconds: float = 0.0
    """Between two bytes of the body."""
    label: str = ""
    """Under which `fired` counts it; the status by default."""


@dataclass(frozen=True)
class Asked:
    """A request as it arrived; `number` counts from 0."""

    number: int
    path: str
    headers: Mapping[str, str]

    @property
    def first(self) -> int:
        """The first byte of the range."""
        return int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])

    @property
    def last(self) -> int:
        """The last byte of the range."""
        return int(self.headers["Range"].rpartition("-")[2])


class FaultServer:
    """`with FaultServer(answer, upstream=url) as server:`; `answer` gives None to pass on."""

    def __init__(
        self,
        answer: Callable[[Asked], Reply | None],
        *,
        upstream: str | None = None,
        tls: ssl.SSLContext | None = None,
        date: str | None = None,
    ) -> None:
        self.answer = answer
        self.upstream = upstream
        self.date = date
        self.fired: Counter[str] = Counter()
        self.requests: list[Asked] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._scheme = "https" if tls else "http"
        owner = self

        class Handler(_Handler):
            server_owner = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)

    @property
    def url(self) -> str:
        """http(s)://127.0.0.1:port"""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def note(self, path: str, headers: Mapping[str, str]) -> Asked:
        """Remember a request."""
        with self._lock:
            asked = Asked(len(self.requests), path, headers)
            self.requests.append(asked)
            return asked

    def count(self, reply: Reply) -> None:
        """Remember a fault that fired."""
        with self._lock:
            self.fired[reply.label or str(reply.status)] += 1

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: FaultServer

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        owner = self.server_owner
        asked = owner.note(self.path, dict(self.headers))
        reply = owner.answer(asked)
        if reply is None:
            self._pass_on(body)
            return
        owner.count(reply)
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        promised = len(reply.body) if reply.promised is None else reply.promised
        if promised >= 0:
            self.send_header("Content-Length", str(promised))
        else:
            self.send_header("Connection", "close")
        if promised != len(reply.body):
            self.close_connection = True
        self.end_headers()
        if not reply.trickle_seconds:
            self.wfile.write(reply.body)
            return
        for byte in reply.body:
            if self.server_owner.stopping.wait(reply.trickle_seconds):
                return
            self.wfile.write(bytes([byte]))

    def _pass_on(self, body: bytes) -> None:
        upstream = urlsplit(self.server_owner.upstream or "")
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            self._send(Reply(answer.status, kept, content))
        finally:
            connection.close()

    def handle(self) -> None:
        """The client may leave in the middle: half of these tests make it."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header: now, or what the test wants."""
        date = self.server_owner.date
        return super().date_time_string(timestamp) if date is None else date  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Quiet."""
