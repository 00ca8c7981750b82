"""What does the exporter answer over HTTP? /metrics, probes, and the start page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tensorserve.errors import ConfigurationError
from tensorserve.telemetry import page, page_html
from tensorserve.telemetry.http_server import HttpServer, Request, Response
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.readiness import Status, Watcher

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
    """Response until `stop` is set (for ever without one). Raises ConfigurationError, OSError.

    An OSError is not caught: a process that can no longer read the log ends, and its supervisor
    starts it again. Otherwise it would show an old state for ever.
    """
    with Exporter(state_dir, host, port) as exporter:
        exporter.watch(stop or threading.Event())


class Exporter(AbstractContextManager["Exporter"]):
    """The HTTP server on `host`:`port` (0: any free port). It answers within its context."""

    def __init__(self, state_dir: Path, host: str, port: int) -> None:
        self._watcher = Watcher(state_dir)
        self._registry = CollectorRegistry()
        self._registry.register(StartCollector(self._watcher.look))
        self._routes: dict[str, Callable[[Request], Response]] = {
            "/": self._page,
            "/start.json": self._page_data,
            "/metrics": self._metrics,
            "/livez": self._live,
            "/readyz": self._ready,
            "/startupz": self._startup,
        }
        try:
            self._server = HttpServer(host, port, self._answer)
        except OSError as error:
            raise ConfigurationError(
                f"The metrics cannot listen on {host} port {port}: {error.strerror}.",
                hint="Set TENSORSERVE_METRICS_HOST or TENSORSERVE_METRICS_PORT to a free one.",
            ) from error
        self.port: int = self._server.port

    def __enter__(self) -> Exporter:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()

    def watch(self, stop: threading.Event) -> None:
        """Probe the engine's /health repeatedly until `stop` is set."""
        while not stop.wait(self._watcher.step()):
            pass

    def _answer(self, request: Request) -> Response:
        if request.method in {"GET", "HEAD"}:
            answer = self._routes.get(request.path, _unknown)(request)
        else:
            answer = _text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD.\n")
            answer = replace(answer, headers={"Allow": "GET, HEAD"})
        # One policy only: a browser enforces every policy that an answer has.
        return replace(answer, headers={**_HEADERS, **answer.headers})

    def _metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Asked before the samples are taken: a failure that is known now is in them.
        failed = self._watcher.look().state.failure is not None
        then = self._watcher.failure_was_scraped if failed else None
        return Response(HTTPStatus.OK, content_type, encode(self._registry), then=then)

    def _live(self, _request: Request) -> Response:
        return _json(HTTPStatus.OK, {"live": True})

    def _ready(self, _request: Request) -> Response:
        status = self._watcher.look()
        return _json(_code(status), {"ready": status.ready, "reason": status.waiting_for})

    def _startup(self, _request: Request) -> Response:
        status = self._watcher.look()
        return _json(_code(status), document(status))

    def _page(self, _request: Request) -> Response:
        content = page.view(self._watcher.look())
        return Response(
            HTTPStatus.OK,
            "text/html; charset=utf-8",
            page_html.render(content).encode(),
            {"Content-Security-Policy": page_html.policy()},
        )

    def _page_data(self, _request: Request) -> Response:
        # Always 200: a browser would log each 503 as an error.
        return _json(HTTPStatus.OK, page.view(self._watcher.look()))


def _unknown(_request: Request) -> Response:
    return _text(HTTPStatus.NOT_FOUND, "Not found.\n")


def _text(code: HTTPStatus, text: str) -> Response:
    return Response(code, "text/plain; charset=utf-8", text.encode())


def _json(code: HTTPStatus, content: dict[str, Any]) -> Response:
    return Response(code, "application/json", json.dumps(content).encode() + b"\n")


def document(status: Status) -> dict[str, Any]:
    """The JSON of /startupz. Bytes, seconds, bytes a second; `eta`: until the load is complete.

    `last_advance`: seconds since a phase changed or bytes went through a stage. Of a failure only
    reason and code are shown: its message names the user's files, and this port asks for no
    password.
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
