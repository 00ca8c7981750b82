"""An HTTP server on 127.0.0.1 that answers from two versions of one file, as an attacker would.

Both have the same length. Which bytes come from the older version is said byte by byte, and how
often; what the server says of the version does not change with it.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class TwoVersions:
    """`with TwoVersions(old, new, headers) as server:`; the file is `server.uri`.

    `headers` are sent with every answer: an ETag that lies, a weak one, a date, or nothing.
    """

    def __init__(self, old: bytes, new: bytes, headers: dict[str, str]) -> None:
        assert len(old) == len(new)
        self.old, self.new, self.headers = old, new, headers
        self.served_old = 0
        """Bytes that came from the older version."""
        self._first = bytearray(len(new))
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            versions = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def uri(self) -> str:
        """http://127.0.0.1:port/model.tensors"""
        return f"http://127.0.0.1:{self._server.server_address[1]}/model.tensors"

    def old_at_first(self, start: int, stop: int) -> None:
        """The first time that bytes [start, stop) are asked for, they are the older version's."""
        self._first[start:stop] = b"\1" * (stop - start)

    def replace(self, data: bytes) -> None:
        """All that is asked for from now on is of `data`."""
        with self._lock:
            self.new = data

    def answer(self, start: int, stop: int) -> bytes:
        """The bytes of one answer; counts those of the older version."""
        with self._lock:
            data = bytearray(self.new[start:stop])
            begin = self._first.find(1, start, stop)
            while begin >= 0:
                end = self._first.find(0, begin, stop)
                end = stop if end < 0 else end
                self._first[begin:end] = bytes(end - begin)
                data[begin - start : end - start] = self.old[begin:end]
                self.served_old += end - begin
                begin = self._first.find(1, end, stop)
            return bytes(data)

    def __enter__(self) -> TwoVersions:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    versions: TwoVersions

    def do_GET(self) -> None:
        found = _RANGE.fullmatch(self.headers["Range"])
        assert found
        size = len(self.versions.new)
        start, stop = int(found[1]), min(int(found[2]) + 1, size)
        data = self.versions.answer(start, stop)
        self.send_response(206)
        for name, value in self.versions.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.write(data)

    def finish(self) -> None:
        """The client may be gone."""
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        """As `finish`."""
        with suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Quiet."""
