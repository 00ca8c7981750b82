"""An HTTP server of ranges on 127.0.0.1 that can be slow, and can be told to misbehave.

Real sockets; each fault is counted when it fires, so that a test can assert that it did.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

from http_server import Handler, HttpServer

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


class RangeServer(HttpServer):
    """Serves the files of a directory. `with RangeServer(directory) as server:`"""

    def __init__(self, directory: Path, *, bytes_per_second: float | None = None) -> None:
        super().__init__(_Handler)
        self.directory = directory
        self.bytes_per_second = bytes_per_second
        self.faults: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.versions: Counter[str] = Counter()
        self.redirects: dict[str, str] = {}
        self.missing = (404, b"not found")
        """(status, body) for what is not there; some servers hide it behind 403, or a web page."""
        self._lock = threading.Lock()
        self._debt_until = time.monotonic()

    def replace(self, name: str) -> None:
        """The object is another one from now on (its ETag changes)."""
        self.versions[name] += 1

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
        self.stopping.wait(max(0.0, until - now))

    def hold(self, seconds: float) -> None:
        """Say nothing for so long, or until the server stops."""
        self.stopping.wait(seconds)

    def etag(self, path: Path) -> str:
        """Changes with `replace`, and with the file."""
        info = path.stat()
        text = f"{path}{info.st_size}{info.st_mtime_ns}{self.versions[path.name]}"
        return f'"{sha256(text.encode()).hexdigest()[:32]}"'


class _Handler(Handler):
    owner: RangeServer

    def do_GET(self) -> None:
        owner = self.owner
        name = unquote(urlsplit(self.path).path).lstrip("/")
        owner.requests.append((name, dict(self.headers)))
        if name in owner.redirects:
            self.answer(302, {"Location": owner.redirects[name]}, b"")
            return
        path = owner.directory / name
        if not path.is_file():
            status, body = owner.missing
            self.answer(status, {}, body)
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
            self.answer(412, {"ETag": etag}, b"")
            return
        if fault and fault.kind == "status":
            self.answer(fault.code, fault.headers, fault.body)
            return
        if start >= size > 0 or size == 0:
            self.answer(416, {"Content-Range": f"bytes */{size}"}, b"")
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
                self.owner.pace(len(data))
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
            self.reset()
            return False
        if kind == "short":
            return False
        if kind == "stall":
            self.owner.hold(30.0)
            return False
        self.owner.hold(0.05)  # trickle
        return True
