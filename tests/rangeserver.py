"""An HTTP server of ranges on 127.0.0.1 that can be slow, and can be told to misbehave.

Real sockets; each fault is counted when it fires, so that a test can assert that it did.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_STEP = 16 * 1024


@dataclass
class Fault:
    """One kind of trouble, for the next `times` requests whose range begins at or after `beyond`.

    Kinds: reset, short, stall, trickle (all `after` so many bytes); status (`code`, `headers`);
    full (200 to a range), wrong_range, no_range_header, changed (another ETag), encoded.
    """

    kind: str
    times: int = 1
    after: int = 1000
    code: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    beyond: int = 1


class RangeServer:
    """Serves the files of a directory. `with RangeServer(directory) as server:`"""

    def __init__(self, directory: Path, *, bytes_per_second: float | None = None) -> None:
        self.directory = directory
        self.bytes_per_second = bytes_per_second
        self.faults: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.versions: Counter[str] = Counter()
        self.redirects: dict[str, str] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._debt_until = time.monotonic()
        self._server = self._make()

    @property
    def url(self) -> str:
        """http://127.0.0.1:port"""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def replace(self, name: str) -> None:
        """The object is another one from now on (its ETag changes)."""
        self.versions[name] += 1

    def __enter__(self) -> RangeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, start: int) -> Fault | None:
        """The fault for a request whose range begins at `start`; counts it."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and start >= fault.beyond:
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    return fault
        return None

    def pace(self, count: int) -> None:
        """Wait until `count` bytes may go, all connections together."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            self._debt_until = max(self._debt_until, now) + count / self.bytes_per_second
            until = self._debt_until
        self._stopping.wait(max(0.0, until - now))

    def hold(self, seconds: float) -> None:
        """Say nothing for so long, or until the server stops."""
        self._stopping.wait(seconds)

    def etag(self, path: Path) -> str:
        """Changes with `replace`, and with the file."""
        info = path.stat()
        text = f"{path}{info.st_size}{info.st_mtime_ns}{self.versions[path.name]}"
        return f'"{sha256(text.encode()).hexdigest()[:32]}"'

    def _make(self) -> ThreadingHTTPServer:
        owner = self

        class Handler(_Handler):
            server_owner = owner

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: RangeServer

    def do_GET(self) -> None:
        owner = self.server_owner
        name = unquote(urlsplit(self.path).path).lstrip("/")
        owner.requests.append((name, dict(self.headers)))
        if name in owner.redirects:
            self._answer(302, {"Location": owner.redirects[name]}, b"")
            return
        path = owner.directory / name
        if not path.is_file():
            self._answer(404, {}, b"not found")
            return
        size = path.stat().st_size
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        fault = owner.take_fault(start)
        if fault and fault.kind == "changed":
            owner.replace(path.name)
        etag = owner.etag(path)
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != etag:
            self._answer(412, {"ETag": etag}, b"")
            return
        if fault and fault.kind == "status":
            self._answer(fault.code, fault.headers, fault.body)
            return
        if start >= size > 0 or size == 0:
            self._answer(416, {"Content-Range": f"bytes */{size}"}, b"")
            return
        self._send(path, start, stop, size, etag, fault, partial=found is not None)

    def _send(
        self, path: Path, start: int, stop: int, size: int, etag: str, fault: Fault | None, *,
        partial: bool,
    ) -> None:  # fmt: skip
        kind = fault.kind if fault else ""
        if kind == "full" or not partial:
            start, stop, partial = 0, size, False
        self.send_response(206 if partial else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(stop - start))
        if kind == "encoded":
            self.send_header("Content-Encoding", "gzip")
        if partial and kind != "no_range_header":
            moved = 1 if kind == "wrong_range" else 0
            self.send_header("Content-Range", f"bytes {start + moved}-{stop - 1 + moved}/{size}")
        self.end_headers()
        sent = 0
        with path.open("rb") as file:
            file.seek(start)
            while sent < stop - start:
                step = min(_STEP, stop - start - sent)
                if fault and kind in {"reset", "short", "stall", "trickle"}:
                    if sent >= fault.after and not self._misbehave(kind):
                        return
                    step = min(step, max(1, fault.after - sent))
                data = file.read(step)
                self.server_owner.pace(len(data))
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                    return
                sent += len(data)

    def _misbehave(self, kind: str) -> bool:
        """False where the response ends here."""
        self.close_connection = True
        if kind == "reset":
            # SO_LINGER with 0 seconds: the kernel sends RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return False
        if kind == "short":
            return False
        if kind == "stall":
            self.server_owner.hold(30.0)
            return False
        self.server_owner.hold(0.05)  # trickle
        return True

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def handle(self) -> None:
        """The client may be gone before it has asked for anything more."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def finish(self) -> None:
        """As `handle`."""
        try:
            super().finish()
        except OSError:
            self.close_connection = True
