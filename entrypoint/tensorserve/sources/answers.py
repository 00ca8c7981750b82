"""Connections to addresses that were looked at, and answers whose header is complete in time.

urllib3 resolves a name itself, after whoever has looked at it; its timeout is one between two
bytes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from http.client import HTTPResponse
from typing import Any, BinaryIO

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from urllib3.util.connection import create_connection

Resolve = Callable[[str, int], Sequence[str]]


def watch_connections(pool: PoolManager, resolve: Resolve) -> None:
    """Connections of `pool` go to an address that `resolve` (host, port) gives, as it gives it.

    It is called for each new connection; name and certificate stay those of the host. What it
    raises, a request raises. Answers have the read timeout for the whole of their header.
    """

    class Plain(_Dialled, HTTPConnection):
        addresses = staticmethod(resolve)

    class Tls(_Dialled, HTTPSConnection):
        addresses = staticmethod(resolve)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    pool.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}


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


class _Dialled(HTTPConnection):
    response_class = _Answer
    addresses: Resolve

    def _new_conn(self) -> socket.socket:
        """As urllib3's, but to addresses that were looked at instead of to a name."""
        failure: OSError | None = None
        # With its dot at the end, where it has one: a name server asks for another name without.
        for address in self.addresses(self._dns_host, self.port):
            try:
                return create_connection(
                    (address, self.port),
                    self.timeout,
                    source_address=self.source_address,
                    socket_options=self.socket_options,
                )
            except OSError as error:
                failure = error
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, f"Connection to {self.host} timed out.") from failure
        raise NewConnectionError(
            self, f"Failed to establish a new connection: {failure}"
        ) from failure
