"""What stands between a client and an S3 server: fronts that change requests, and proxies.

All on 127.0.0.1. Host is passed on as it came, so that only what a front changes can break a
signature. What came through is counted.
"""

from __future__ import annotations

import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from http_server import HOP_BY_HOP, Handler, HttpServer


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    """As in the request line: a path, or a whole URL at a proxy."""
    headers: Mapping[str, str]

    @property
    def host(self) -> str:
        """Without its port."""
        return self.headers.get("Host", "").partition(":")[0]

    @property
    def is_object(self) -> bool:
        """Whether an object is read, and not a bucket listed."""
        return self.method == "GET" and "list-type" not in self.target


Refuse = Callable[[Seen], tuple[int, str, str] | None]


class Front(HttpServer):
    """`with Front(port) as front:`, before the server at `port` of 127.0.0.1.

    `change` gives the headers to pass on, `refuse` (status, code, message) instead of an answer,
    `name` the Content-Encoding to give objects; `password` ("user:password") is asked for as a
    proxy does. With `tunnel`, CONNECT leads to that port, whatever is asked for.
    """

    def __init__(
        self,
        port: int,
        *,
        change: Callable[[dict[str, str]], dict[str, str]] = lambda headers: headers,
        refuse: Refuse = lambda _: None,
        name: str | None = None,
        password: str | None = None,
        tunnel: int | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(_Handler, tls=tls)
        self.upstream = port
        self.change, self.refuse, self.name, self.tunnel = change, refuse, name, tunnel
        self.password = f"Basic {b64encode(password.encode()).decode()}" if password else None
        self.seen: list[Seen] = []


class _Handler(Handler):
    owner: Front

    def do_GET(self) -> None:
        front = self.owner
        body = self.body()
        seen = Seen(self.command, self.path, dict(self.headers.items()))
        front.seen.append(seen)
        if self._wants_password():
            return
        refused = front.refuse(seen)
        if refused is not None:
            status, code, message = refused
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
            self.answer(status, {"Content-Type": "application/xml"}, text.encode())
            return
        headers = {
            name: value
            for name, value in front.change(dict(seen.headers)).items()
            if name.lower() not in {*HOP_BY_HOP, "proxy-authorization", "expect"}
        }
        parts = urlsplit(self.path)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        upstream = f"127.0.0.1:{front.upstream}"
        with self.passed_on(upstream, target, headers.items(), body) as answer:
            data = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in {*HOP_BY_HOP, "content-length", "content-encoding"}
        }
        if front.name and seen.is_object and answer.status in {200, 206}:
            kept["Content-Encoding"] = front.name
        self.answer(answer.status, kept, data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def do_CONNECT(self) -> None:
        front = self.owner
        front.seen.append(Seen("CONNECT", self.path, dict(self.headers.items())))
        if self._wants_password():
            return
        if front.tunnel is None:
            self.answer(403, {}, b"")
            return
        with socket.create_connection(("127.0.0.1", front.tunnel)) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(there, self.connection), daemon=True)
            back.start()
            _pump(self.connection, there)
            back.join(5)
        self.close_connection = True

    def _wants_password(self) -> bool:
        front = self.owner
        if front.password in {None, self.headers.get("Proxy-Authorization")}:
            return False
        self.answer(407, {"Proxy-Authenticate": "Basic"}, b"")
        return True


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
