"""What does a start answer over HTTP? /metrics, /livez, /readyz, /startupz, and the start page."""

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
from tensorserve.telemetry import page
from tensorserve.telemetry.answering import Answer, AnsweringServer, Request
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
        self._start_page = page.StartPage(state_dir)
        self._registry = CollectorRegistry()
        self._registry.register(StartCollector(self._watcher.look))
        self._routes: dict[str, Callable[[Request], Answer]] = {
            "/": self._page,
            "/start.json": self._page_data,
            "/metrics": self._metrics,
            "/livez": self._live,
            "/readyz": self._ready,
            "/startupz": self._startup,
        }
        try:
            self._server = AnsweringServer(host, port, self._answer)
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
        """Ask the engine's /health again and again until `stop` is set."""
        while not stop.wait(self._watcher.step()):
            pass

    def _answer(self, request: Request) -> Answer:
        if request.method in {"GET", "HEAD"}:
            answer = self._routes.get(request.path, _unknown)(request)
        else:
            answer = _text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD.\n")
            answer = replace(answer, headers={"Allow": "GET, HEAD"})
        # One policy an answer: of two, a browser obeys what both allow.
        return replace(answer, headers={**_HEADERS, **answer.headers})

    def _metrics(self, request: Request) -> Answer:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # Before the samples are taken: what was written by now is in them.
        failed = self._watcher.look().state.failure is not None
        then = self._watcher.failure_was_scraped if failed else None
        return Answer(HTTPStatus.OK, content_type, encode(self._registry), then=then)

    def _live(self, _request: Request) -> Answer:
        return _json(HTTPStatus.OK, {"live": True})

    def _ready(self, _request: Request) -> Answer:
        status = self._watcher.look()
        return _json(_code(status), {"ready": status.ready, "reason": status.waiting_for})

    def _startup(self, _request: Request) -> Answer:
        status = self._watcher.look()
        return _json(_code(status), document(status))

    def _page(self, _request: Request) -> Answer:
        content = self._start_page.view(self._watcher.look())
        return Answer(
            HTTPStatus.OK,
            "text/html; charset=utf-8",
            page.render(content).encode(),
            {"Content-Security-Policy": page.policy()},
        )

    def _page_data(self, _request: Request) -> Answer:
        # 200 at any time: a browser would log the 503 of /startupz as an error every second.
        return _json(HTTPStatus.OK, self._start_page.view(self._watcher.look()))


def _unknown(_request: Request) -> Answer:
    return _text(HTTPStatus.NOT_FOUND, "Not found.\n")


def _text(code: HTTPStatus, text: str) -> Answer:
    return Answer(code, "text/plain; charset=utf-8", text.encode())


def _json(code: HTTPStatus, content: dict[str, Any]) -> Answer:
    return Answer(code, "application/json", json.dumps(content).encode() + b"\n")


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
