"""Parts that the telemetry tests share: events at chosen times, a fake engine, a deadline."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorserve.telemetry import Edge, EventLog, Phase, events_path
from tensorserve.telemetry.event_codec import Record, decode
from tensorserve.telemetry.exporter import Exporter
from tensorserve.telemetry.schema import (
    LoadCounts,
    LoadDone,
    LoadPlanned,
    LoadProgressed,
    PhaseChanged,
    StartBegan,
)


def at(t: float, event: str, **fields: Any) -> Record:
    """An event as the reader gives it, from the fields of its line, which may be damaged."""
    line = {"t": t, "w": 1_700_000_000.0 + t, "pid": 1, "event": event, **fields}
    record = decode(json.dumps(line).encode())
    assert record is not None
    return record


def begin(t: float, phase: str) -> Record:
    return at(t, "phase", phase=phase, state="begin")


def end(t: float, phase: str) -> Record:
    return at(t, "phase", phase=phase, state="end")


def progress(t: float, copy: int, *, rank: int = 0, **fields: Any) -> Record:
    """A `load_progress` in which every stage has done `copy` bytes unless told otherwise."""
    counts = {"fetch": copy, "decrypt": copy, "copy": copy}
    seconds = {"fetch_seconds": 1.0, "decrypt_seconds": 0.5, "copy_seconds": 0.25}
    rest = {"rank": rank, "requests": 0, "retries": {}}
    return at(t, "load_progress", **(counts | seconds | rest | fields))


def whole_start(loader: str = "auto") -> list[Record]:
    """A start of 60 s by one rank: 1000 bytes in 10 s, 7 requests, 3 of them sent again."""
    return [
        at(100, "start", start_id="a", version="0.1.0", health_url="http://127.0.0.1:1/health"),
        begin(101, "preflight"),
        end(102, "preflight"),
        begin(102, "artifacts"),
        end(103, "artifacts"),
        begin(103, "import"),
        end(130, "import"),
        begin(130, "init"),
        begin(131, "load"),
        at(131, "load_plan", rank=0, bytes=1000, tensors=3, loader=loader),
        progress(136, 500, requests=4, retries={"reset": 1}),
        progress(141, 1000, requests=7, retries={"reset": 1, "stall": 2}),
        at(141, "load_done", rank=0),
        end(141, "load"),
        begin(141, "postprocess"),
        end(142, "postprocess"),
        begin(142, "warmup"),
        end(159.9, "warmup"),
        at(160, "ready", start_id="a"),
    ]


class Engine:
    """A /health on a real socket; `status` is what it answers, `asked` how often it was asked."""

    def __init__(self) -> None:
        engine = self
        self.status = 503
        self.asked = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                engine.asked += 1
                self.send_response(engine.status)
                self.send_header("Location", "/health-elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/health"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


class Client:
    """Asks one exporter."""

    def __init__(self, exporter: Exporter) -> None:
        self.port = exporter.port

    def ask(
        self, path: str, method: str = "GET", accept: str = "*/*"
    ) -> tuple[int, dict[str, str], str]:
        """(status, headers, body)."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", method=method, headers={"Accept": accept}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, dict(answer.headers), answer.read().decode()

    def status(self, path: str) -> int:
        return self.ask(path)[0]


@contextmanager
def exporting(state_dir: Path) -> Iterator[Client]:
    """An exporter that answers and watches, on a free port of loopback."""
    stop = threading.Event()
    with Exporter(state_dir, "127.0.0.1", 0) as exporter:
        watch = threading.Thread(target=exporter.watch, args=(stop,))
        watch.start()
        try:
            yield Client(exporter)
        finally:
            stop.set()
            watch.join()


def log_start(state_dir: Path, engine: Engine, start_id: str = "a") -> EventLog:
    """A log in which a start has just begun."""
    log = EventLog(events_path(state_dir))
    begin_start(log, start_id, engine.url)
    return log


def begin_start(log: EventLog, start_id: str, health_url: str) -> None:
    """A start begins, as `up` logs it."""
    log.emit(StartBegan(start_id, "0.1.0", 0, health_url, 8000, 9400))


def write_line(state_dir: Path, event: str, **fields: Any) -> None:
    """A line that no `emit` would write: damaged, or of another version."""
    record = {"t": time.monotonic(), "w": time.time(), "pid": 1, "event": event, **fields}
    with events_path(state_dir).open("a") as log:
        log.write(json.dumps(record) + "\n")


def log_load(log: EventLog, *, copied: int, done: bool, rank: int = 0) -> None:
    """A load of 1000 bytes that has come to `copied`."""
    log.emit(PhaseChanged(Phase.LOAD, Edge.BEGIN))
    log.emit(LoadPlanned(rank, 1000, 3, "auto", "libcurl", sharing="one_rank", opens=1000))
    counts = LoadCounts(copied, copied, copied, 1.0, 0.5, 0.25, requests=7, retries={"reset": 2})
    log.emit(LoadProgressed(rank, counts))
    if done:
        log.emit(LoadDone(rank))
        log.emit(PhaseChanged(Phase.WARMUP, Edge.BEGIN))
