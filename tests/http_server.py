"""The HTTP(S) server of all tests: a thread for each connection, on 127.0.0.1.

A subclass says what it answers: files and their ranges (rangeserver.py), what a test says
(faultserver.py), an S3 server's answers changed or refused (fronts.py) or broken (faults/proxy.py),
two versions of a file (attacks/two_versions.py).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

# Of the connection, not of the message (RFC 9110, 7.6.1): not passed on.
HOP_BY_HOP = frozenset({"connection", "proxy-connection", "keep-alive", "transfer-encoding"})


class HttpServer:
    """`with HttpServer(Handler) as server:`; the handler finds it as `self.owner`."""

    def __init__(
        self, handler: type[Handler], *, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.stopping = threading.Event()
        """Set at the end: what an answer waits for ends then."""
        owner = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def verify_request(self, request: Any, _address: Any) -> bool:
                return owner.admits(request)

            def handle_error(self, request: Any, address: Any) -> None:
                """A client that leaves is what many tests are about."""

        self._server = Server(("127.0.0.1", port), type("Handler", (handler,), {"owner": owner}))
        self._scheme = "https" if tls else "http"
        if tls:
            # The handshake happens in the connection's own thread, at its first read.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """http(s)://127.0.0.1:port"""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def admits(self, connection: socket.socket) -> bool:  # noqa: ARG002
        """Whether this connection is served; one that is not has been closed here."""
        return True

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="http server", daemon=True
        ).start()
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


class Handler(BaseHTTPRequestHandler):
    """One connection. The client may leave at any time."""

    protocol_version = "HTTP/1.1"
    owner: Any

    def body(self) -> bytes:
        """What came with the request."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send all of an answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @contextmanager
    def passed_on(
        self, netloc: str, target: str, headers: Iterable[tuple[str, str]], body: bytes
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer of the server at `netloc` to this request with these headers.

        Host is one of `headers`: as it came, it keeps a signature valid.
        """
        connection = http.client.HTTPConnection(netloc, timeout=30)
        try:
            connection.putrequest(self.command, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders(body or None)
            yield connection.getresponse()
        finally:
            connection.close()

    def reset(self) -> None:
        """End the connection with a reset."""
        reset(self.connection)
        self.close_connection = True

    def handle(self) -> None:
        with suppress(OSError, http.client.HTTPException):
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def reset(connection: socket.socket) -> None:
    """Close with SO_LINGER of 0 seconds: the kernel sends RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
