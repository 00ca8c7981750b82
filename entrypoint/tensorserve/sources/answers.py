"""Answers whose header must be complete in time: urllib3's timeout is one between two bytes."""

from __future__ import annotations

import socket
import time
from http.client import HTTPResponse
from typing import Any, BinaryIO

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


def watch_headers(pool: PoolManager) -> None:
    """Answers that come through `pool` have the read timeout for the whole of their header."""
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class _TimedLines:
    """Reads a header's lines from `file`, over `connection`, until a moment; then TimeoutError."""

    def __init__(self, file: BinaryIO, connection: socket.socket, until: float) -> None:
        # http.client makes it with makefile("rb"): a BufferedReader, which can peek.
        self._file: Any = file
        self._connection = connection
        self._until = until

    def readline(self, limit: int) -> bytes:
        """As a file's."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n"):
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the header of an answer takes too long")
            self._connection.settimeout(left)
            there = self._file.peek(1)  # at most one read of the socket
            if not there:
                break
            count = there.find(b"\n") + 1 or len(there)
            line += self._file.read(min(count, limit - len(line)))
        return line

    def close(self) -> None:
        """As a file's."""
        self._file.close()


class _Answer(HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self._connection = sock

    def begin(self) -> None:
        """As http.client's: reads status and header."""
        connection, file = self._connection, self.fp
        seconds = connection.gettimeout()
        if seconds is None or self.headers is not None:
            super().begin()
            return
        until = time.monotonic() + seconds
        self.fp = _TimedLines(file, connection, until)
        try:
            super().begin()
        finally:
            if self.fp is not None:
                self.fp = file
        connection.settimeout(seconds)


class _Connection(HTTPConnection):
    response_class = _Answer


class _TlsConnection(HTTPSConnection):
    response_class = _Answer


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
