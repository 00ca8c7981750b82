"""How are connections made to checked addresses only, with a time limit for a response's header?

urllib3 resolves a name itself, after any check of it, and its read timeout applies to each single
read of the socket.
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
    """Makes `pool` connect to the addresses that `resolve` (host, port) returns.

    `resolve` is called for each new connection, and its exceptions are raised by the request. The
    host's name is still used for TLS. The read timeout applies to a response's whole header.
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
    """Reads a header's lines from `file`, over `connection`; TimeoutError at the time `until`."""

    def __init__(self, file: BinaryIO, connection: socket.socket, until: float) -> None:
        # http.client creates it with makefile("rb"): a BufferedReader, which has peek().
        self._file: Any = file
        self._connection = connection
        self._until = until

    def readline(self, limit: int) -> bytes:
        """As a file's."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n"):
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the header of a response takes too long")
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
        """As urllib3's, but connects to the checked addresses instead of the name."""
        # With the name's final dot, if any: without it, the resolver may use a search domain.
        return dial(
            self.addresses(self._dns_host, self.port),
            self.port,
            self.timeout,
            f"{self.host}:{self.port}",
            source_address=self.source_address,
            socket_options=self.socket_options,
        )


def dial(
    addresses: Sequence[str], port: int, timeout: float | None, who: str, **options: Any
) -> socket.socket:
    """A connection to the first of `addresses` that answers; `timeout` seconds for each.

    Raises urllib3's ConnectTimeoutError or NewConnectionError, with `who` in their text.
    """
    failure: OSError | None = None
    for address in addresses:
        try:
            return create_connection((address, port), timeout, **options)
        except OSError as error:
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(who, "the connection timed out") from failure
    raise NewConnectionError(
        who,  # type: ignore[arg-type]
        f"Failed to establish a new connection: {failure}",
    ) from failure
