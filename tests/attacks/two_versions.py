"""An HTTP server on 127.0.0.1 that answers from two versions of one file, as an attacker would.

Both have the same length. Which bytes come from the older version is said byte by byte, and how
often; what the server says of the version does not change with it.
"""

from __future__ import annotations

import re
import threading

from http_server import Handler, HttpServer

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class TwoVersions(HttpServer):
    """`with TwoVersions(old, new, headers) as server:`; the file is `server.uri`.

    `headers` are sent with every answer: an ETag that lies, a weak one, a date, or nothing.
    """

    def __init__(self, old: bytes, new: bytes, headers: dict[str, str]) -> None:
        assert len(old) == len(new)
        super().__init__(_Handler)
        self.old, self.new, self.headers = old, new, headers
        self.served_old = 0
        """Bytes that came from the older version."""
        self._first = bytearray(len(new))
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """http://127.0.0.1:port/model.tensors"""
        return f"{self.url}/model.tensors"

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


class _Handler(Handler):
    owner: TwoVersions

    def do_GET(self) -> None:
        found = _RANGE.fullmatch(self.headers["Range"])
        assert found
        size = len(self.owner.new)
        start, stop = int(found[1]), min(int(found[2]) + 1, size)
        data = self.owner.answer(start, stop)
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.answer(206, self.owner.headers | place, data)
