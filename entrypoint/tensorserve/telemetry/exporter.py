"""What does a start answer over HTTP? /metrics, /livez, /readyz, /startupz, and the start page."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET, AF_INET6, socket
from types import MappingProxyType, TracebackType
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tensorserve.errors import ConfigurationError
from tensorserve.telemetry import page
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.readiness import Status, Watcher

# A prober that opens connections and says nothing must not use up the container's threads.
_MOST_CONNECTIONS = 64
_CONNECTION_TIMEOUT = 10.0
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def serve_exporter(
    state_dir: Path, host: str, port: int, stop: threading.Event | None = None
) -> None:
    """Answer until `stop` is set (for ever without one). Raises ConfigurationError, OSError.

    Nothing is caught here: a process that can no longer read the log must end and be started again
    by its supervisor rather than show an old state for ever.
    """
    with Exporter(state_dir, host, port) as exporter:
        exporter.watch(stop or threading.Event())


class Exporter(AbstractContextManager["Exporter"]):
    """The HTTP server on `host`:`port` (0: any free one); it answers while the context lasts."""

    def __init__(self, state_dir: Path, host: str, port: int) -> None:
        self._watcher = Watcher(state_dir)
        try:
            self._server = _Server(host, port, self._watcher, page.StartPage(state_dir))
        except OSError as error:
            raise ConfigurationError(
                f"The metrics cannot listen on {host} port {port}: {error.strerror}.",
                hint="Set TENSORSERVE_METRICS_HOST or TENSORSERVE_METRICS_PORT to a free one.",
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="tensorserve-http", daemon=True
        )

    def __enter__(self) -> Exporter:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def watch(self, stop: threading.Event) -> None:
        """Ask the engine's /health again and again until `stop` is set."""
        while not stop.wait(self._watcher.step()):
            pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # socketserver's 5 lets a burst of probes wait for seconds, until TCP tries again.
    request_queue_size = 128

    def __init__(self, host: str, port: int, watcher: Watcher, start_page: page.StartPage) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.watcher = watcher
        self.start_page = start_page
        self.registry = CollectorRegistry()
        self.registry.register(StartCollector(watcher.look))
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the host's full name: seconds, where there is no DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        # A client that has gone away is no news.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _CONNECTION_TIMEOUT
    _own_headers: Mapping[str, str] = MappingProxyType({})

    def do_GET(self) -> None:
        routes: dict[str, Callable[[], None]] = {
            "/": self._page,
            "/start.json": self._page_data,
            "/metrics": self._metrics,
            "/livez": self._live,
            "/readyz": self._ready,
            "/startupz": self._startup,
        }
        routes.get(urlsplit(self.path).path, self._unknown)()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(
            HTTPStatus.METHOD_NOT_ALLOWED,
            "text/plain; charset=utf-8",
            b"Only GET and HEAD.\n",
            {"Allow": "GET, HEAD"},
        )

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _metrics(self) -> None:
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        # Before the samples are taken: what was written by now is in them.
        failed = self.server.watcher.look().state.failure is not None
        self._answer(HTTPStatus.OK, content_type, encode(self.server.registry))
        if failed:
            self.server.watcher.failure_was_scraped()

    def _live(self) -> None:
        self._json(HTTPStatus.OK, {"live": True})

    def _ready(self) -> None:
        status = self.server.watcher.look()
        self._json(_code(status), {"ready": status.ready, "reason": status.waiting_for})

    def _startup(self) -> None:
        status = self.server.watcher.look()
        self._json(_code(status), document(status))

    def _page(self) -> None:
        content = self.server.start_page.view(self.server.watcher.look())
        self._answer(
            HTTPStatus.OK,
            "text/html; charset=utf-8",
            page.render(content).encode(),
            {"Content-Security-Policy": page.policy()},
        )

    def _page_data(self) -> None:
        # 200 at any time: a browser would log the 503 of /startupz as an error every second.
        content = self.server.start_page.view(self.server.watcher.look())
        self._json(HTTPStatus.OK, content)

    def _unknown(self) -> None:
        self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"Not found.\n")

    def _json(self, code: HTTPStatus, content: dict[str, Any]) -> None:
        self._answer(code, "application/json", json.dumps(content).encode() + b"\n")

    def _answer(
        self,
        code: HTTPStatus,
        content_type: str,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self._own_headers = headers or {}
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        # One policy an answer: of two, a browser obeys what both allow.
        for name, value in {**_HEADERS, **self._own_headers}.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "tensorserve"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: probes come every few seconds and would bury the engine's own output."""


def document(status: Status) -> dict[str, Any]:
    """What /startupz says. Bytes, seconds, bytes a second; `eta`: until the load is complete.

    `last_advance`: seconds since a phase changed or bytes went through a stage. Failures show their
    reason and code alone: their messages name the user's files, and this port asks for no password.
    """
    state, now = status.state, status.now
    durations = state.phase_seconds(now)
    eta = state.eta(now)
    return {
        "phase": state.phase,
        "ready": status.ready,
        "reason": status.waiting_for,
        "progress": round(state.progress, 4),
        "bytes": state.arrived_bytes,
        "total_bytes": state.planned_bytes,
        "rate": round(state.rate(now)),
        "eta": None if eta is None else round(eta, 1),
        "last_advance": None
        if state.last_advance is None
        else round(max(0.0, now - state.last_advance), 3),
        "startup_seconds": round(state.startup_seconds(now), 3),
        "phases": {phase: round(seconds, 3) for phase, seconds in durations.items()},
        "failures": dict(sorted(state.failures.items())),
        "retries": dict(sorted(state.retries.items())),
    }


def _code(status: Status) -> HTTPStatus:
    return HTTPStatus.OK if status.ready else HTTPStatus.SERVICE_UNAVAILABLE
