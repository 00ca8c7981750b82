"""An HTTP(S) server on 127.0.0.1 that answers as a test says, and passes the rest on to a real one.

For what rangeserver.py cannot show: odd headers, half an error document, and faults in front of a
real S3 server. A request is passed on with its Host as it came, so that a signature stays valid.
"""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from http_server import HOP_BY_HOP, Handler, HttpServer


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


class FaultServer(HttpServer):
    """`with FaultServer(answer, upstream=url) as server:`; `answer` gives None to pass on."""

    def __init__(
        self,
        answer: Callable[[Asked], Reply | None],
        *,
        upstream: str | None = None,
        tls: ssl.SSLContext | None = None,
        date: str | None = None,
    ) -> None:
        super().__init__(_Handler, tls=tls)
        self.answer = answer
        self.upstream = upstream
        self.date = date
        self.fired: Counter[str] = Counter()
        self.requests: list[Asked] = []
        self._lock = threading.Lock()

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


class _Handler(Handler):
    owner: FaultServer

    def do_GET(self) -> None:
        body = self.body()
        owner = self.owner
        asked = owner.note(self.path, dict(self.headers))
        reply = owner.answer(asked)
        if reply is None:
            self._pass_on(body)
            return
        owner.count(reply)
        self._send(reply)

    do_POST = do_PUT = do_DELETE = do_GET

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
            if self.owner.stopping.wait(reply.trickle_seconds):
                return
            self.wfile.write(bytes([byte]))

    def _pass_on(self, body: bytes) -> None:
        netloc = urlsplit(self.owner.upstream or "").netloc
        with self.passed_on(netloc, self.path, self.headers.items(), body) as answer:
            content = answer.read()
        gone = HOP_BY_HOP | {"content-length"}
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in gone}
        self._send(Reply(answer.status, kept, content))

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header: now, or what the test wants."""
        date = self.owner.date
        return super().date_time_string(timestamp) if date is None else date  # type: ignore[arg-type]
