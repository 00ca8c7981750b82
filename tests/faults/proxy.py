"""Proxies that make trouble in front of a real server, on 127.0.0.1; every fault that fires counts.

FaultProxy speaks HTTP(S) and passes a request on as it came, Host included, so that a signature
stays valid. WireProxy knows bytes only, for what happens below TLS.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from http_server import Handler, HttpServer, reset

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_STEP = 64 * 1024
_FOR_EVER = 10**9
# Longer than any test lets a client wait.
_SILENCE = 30.0


@dataclass
class Asked:
    """A request as it arrived; `number` counts from 0, `first` and `last` are its range."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        self.first = int(found[1]) if found else 0
        self.last = int(found[2]) if found else -1


@dataclass
class Fault:
    """One kind of trouble, and the requests that it is for.

    In the body: `reset`, `short`, `stall`, `slow` (each after `after` bytes of it) and `flip` (of
    the lowest bit of byte `at` of the object). Instead of the real answer: `status` (`code`,
    `headers`, `body`), `whole` (200, with the whole object as `body`). In the header: `range` (a
    Content-Range one byte on), `no_range`; `silent` sends none, `drip` one without end. `none`
    changes nothing and is there for its `hook`, which runs when a fault fires.
    """

    kind: str
    times: int = 1
    chance: float = 1.0
    beyond: int = 1
    """Only ranges that begin there or later; the first look at an object begins at 0."""
    at: int | None = None
    """Only ranges that hold this byte of the object."""
    path: str = ""
    """Only paths that end so."""
    after: int = 1000
    rate: float = 1000.0
    code: int = 503
    headers: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(default_factory=dict)
    """Or a function that makes them when the fault fires."""
    body: bytes = b""
    hook: Callable[[Asked], None] | None = None
    label: str = ""
    """What `fired` counts it as; `kind` by default."""

    def fits(self, asked: Asked) -> bool:
        """Whether it is meant for this request."""
        if asked.method != "GET" or not asked.path.partition("?")[0].endswith(self.path):
            return False
        # Where the body is too short, it could not fire.
        breaks = self.kind in {"reset", "short", "stall", "slow"}
        if breaks and asked.last - asked.first < self.after:
            return False
        if self.at is not None:
            return asked.first <= self.at <= asked.last
        return asked.first >= self.beyond


class FaultProxy(HttpServer):
    """`with FaultProxy(upstream_url) as proxy:`; faults are taken in the order of `faults`."""

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 0,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        resets: int = 0,
    ) -> None:
        """`resets`: so many connections are reset before anything is said on them."""
        super().__init__(_Handler, port=port, tls=tls)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.requests: list[Asked] = []
        self.resets = resets
        self.host: str | None = None
        """The Host to pass on, where that of the request is not to stay."""
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def add(self, kind: str, **options: Any) -> Fault:
        """One more fault; `times=0` means without end."""
        if options.get("times") == 0:
            options["times"] = _FOR_EVER
        self.faults.append(Fault(kind, **options))
        return self.faults[-1]

    def take(self, asked: Asked) -> Fault | None:
        """The fault for this request."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.fits(asked) and self._random.random() < fault.chance:
                    fault.times -= 1
                    return fault
        return None

    def note(self, method: str, path: str, headers: Mapping[str, str]) -> Asked:
        """Remember a request."""
        with self._lock:
            self.requests.append(Asked(len(self.requests), method, path, headers))
            return self.requests[-1]

    def count(self, fault: Fault, asked: Asked) -> None:
        """It fires now."""
        with self._lock:
            self.fired[fault.label or fault.kind] += 1
        if fault.hook is not None:
            fault.hook(asked)

    def admits(self, connection: socket.socket) -> bool:
        """False where this connection was reset before anything was said on it."""
        with self._lock:
            if self.resets <= 0:
                return True
            self.resets -= 1
            self.fired["connection"] += 1
        reset(connection)
        return False


class _Handler(Handler):
    owner: FaultProxy

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        body = self.body()
        asked = self.owner.note(self.command, self.path, dict(self.headers.items()))
        fault = self.owner.take(asked)
        kind = fault.kind if fault else ""
        if fault and kind in {"status", "whole"}:
            self.owner.count(fault, asked)
            headers = fault.headers() if callable(fault.headers) else fault.headers
            self.answer(200 if kind == "whole" else fault.code, headers, fault.body)
        elif fault and kind == "silent":
            self.owner.count(fault, asked)
            self.close_connection = True
            self.owner.stopping.wait(_SILENCE)
        elif fault and kind == "drip":
            self.owner.count(fault, asked)
            self.close_connection = True
            self._drip()
        else:
            if fault and kind == "none":
                self.owner.count(fault, asked)
            self._pass_on(asked, body, fault)

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Date": self.date_time_string()} | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        """A header that never ends, ten bytes a second."""
        self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nX-Slow: ")
        while not self.owner.stopping.wait(0.1):
            self.wfile.write(b"x")

    def _pass_on(self, asked: Asked, body: bytes, fault: Fault | None) -> None:
        headers = [
            (name, self.owner.host if self.owner.host and name.lower() == "host" else value)
            for name, value in self.headers.items()
        ]
        with self.passed_on(self.owner.upstream, self.path, headers, body) as answer:
            self._send_header(answer, asked, fault)
            self._send_body(answer, asked, fault)

    def _send_header(
        self, answer: http.client.HTTPResponse, asked: Asked, fault: Fault | None
    ) -> None:
        kind = fault.kind if fault else ""
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            low = name.lower()
            if low in {"connection", "keep-alive", "transfer-encoding"}:
                continue
            if low == "content-range" and fault and kind in {"range", "no_range"}:
                self.owner.count(fault, asked)
                if kind == "no_range":
                    continue
                value = f"bytes {asked.first + 1}-{asked.last + 1}/{value.rpartition('/')[2]}"
            self.send_header(name, value)
        if answer.length is None:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_body(
        self, answer: http.client.HTTPResponse, asked: Asked, fault: Fault | None
    ) -> None:
        kind = fault.kind if fault else ""
        sent = 0
        while data := answer.read(self._step(sent, fault)):
            if fault and kind == "flip" and fault.at is not None:
                place = fault.at - asked.first - sent
                if 0 <= place < len(data):
                    self.owner.count(fault, asked)
                    data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            self.wfile.write(data)
            sent += len(data)
            if fault and sent == fault.after and kind in {"reset", "short", "stall", "slow"}:
                self.owner.count(fault, asked)
                if kind == "slow":
                    self._trickle(answer, fault)
                elif kind == "stall":
                    self.owner.stopping.wait(_SILENCE)
                elif kind == "reset":
                    self.reset()
                self.close_connection = True
                return

    def _step(self, sent: int, fault: Fault | None) -> int:
        if fault and fault.kind in {"reset", "short", "stall", "slow"} and sent < fault.after:
            return min(_STEP, fault.after - sent)
        return _STEP

    def _trickle(self, answer: http.client.HTTPResponse, fault: Fault) -> None:
        piece = max(1, int(fault.rate / 20))
        while data := answer.read(piece):
            self.wfile.write(data)
            if self.owner.stopping.wait(len(data) / fault.rate):
                return


class WireProxy:
    """Passes bytes between a client and a port of 127.0.0.1, and knows nothing of them.

    The first `times` connections suffer what `kind` says: `flip` (a bit of what the server sends,
    after `after` bytes of it), `cut` (closed there), `silent` (accepted, and nothing more).
    """

    def __init__(self, upstream_port: int, kind: str, *, times: int = 1, after: int = 0) -> None:
        self.kind = kind
        self.after = after
        self.fired: Counter[str] = Counter()
        self._times = times
        self._upstream = upstream_port
        self._stopping = threading.Event()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> WireProxy:
        threading.Thread(target=self._accept, name="wire", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._shut(self._listener)
        for connection in self._open:
            self._shut(connection)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            spoilt = self._times > 0
            self._times -= spoilt
            if spoilt and self.kind == "silent":
                self.fired["silent"] += 1
                continue
            server = socket.create_connection(("127.0.0.1", self._upstream))
            self._open.append(server)
            for pair in ((client, server, False), (server, client, spoilt)):
                threading.Thread(target=self._pump, args=pair, name="wire", daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, spoilt: bool) -> None:
        passed = 0
        with suppress(OSError):
            for data in self._pieces(source):
                end = passed + len(data)
                if spoilt and passed <= self.after < end:
                    self.fired[self.kind] += 1
                    place = self.after - passed
                    if self.kind == "cut":
                        target.sendall(data[:place])
                        break
                    data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
                target.sendall(data)
                passed = end
        self._shut(source)
        self._shut(target)

    def _pieces(self, source: socket.socket) -> Iterator[bytes]:
        while data := source.recv(_STEP):
            yield data

    @staticmethod
    def _shut(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
