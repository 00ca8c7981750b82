"""What does vLLM's /metrics look like? Made from the names and types in vLLM's own loggers.py.

Read, not imported: vLLM takes half a minute to import, and a server of it needs a model.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_KINDS: dict[str, type[Gauge | Counter | Histogram]] = {
    "_gauge_cls": Gauge,
    "_counter_cls": Counter,
    "_histogram_cls": Histogram,
}


@dataclass(frozen=True)
class VllmMetric:
    """One family as vLLM defines it; `kind` is prometheus_client's class."""

    name: str
    kind: type[Gauge | Counter | Histogram]
    labels: tuple[str, ...]


def vllm_metrics() -> list[VllmMetric]:
    """The families that vLLM exports whatever its settings are (none from below an `if`)."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "v1" / "metrics" / "loggers.py"
    tree = ast.parse(path.read_text())
    logger = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "PrometheusStatLogger"
    )
    init = next(
        node
        for node in logger.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    found = [metric for statement in init.body for metric in _defined_by(statement)]
    assert len(found) > 20, f"{path} is not written as this reader expects"
    return found


def _defined_by(statement: ast.stmt) -> Iterator[VllmMetric]:
    if isinstance(statement, ast.If):
        return
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            kind = _KINDS.get(node.func.attr)
            arguments = {word.arg: word.value for word in node.keywords}
            if kind is not None and isinstance(arguments.get("name"), ast.Constant):
                name = ast.literal_eval(arguments["name"])
                yield VllmMetric(name, kind, _labels(arguments["labelnames"]))


def _labels(node: ast.expr) -> tuple[str, ...]:
    """`labelnames`, `labelnames + [...]` or a list."""
    if isinstance(node, ast.Name):
        return ("model_name", "engine")
    if isinstance(node, ast.BinOp):
        return (*_labels(node.left), *_labels(node.right))
    return tuple(ast.literal_eval(node))


class VllmServer:
    """/metrics with those families, a little more with each scrape as under load, and /health."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = [
            (metric, metric.kind(metric.name, metric.name, metric.labels, registry=self._registry))
            for metric in vllm_metrics()
        ]
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = server.scrape() if self.path == "/metrics" else b""
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def scrape(self) -> bytes:
        """One answer; between two of them some requests have been served."""
        for metric, family in self._metrics:
            values = {label: f"some_{label}" for label in metric.labels}
            child = family.labels(**(values | {"engine": "0"} if "engine" in values else values))
            if isinstance(child, Gauge):
                child.set(0.5)
            elif isinstance(child, Counter):
                child.inc(10)
            else:
                for seconds in (0.02, 0.03, 0.2):
                    child.observe(seconds)
        return generate_latest(self._registry)

    def __enter__(self) -> VllmServer:
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
