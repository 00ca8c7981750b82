"""Bodies within TLS: records are gathered, and what fails behind them is not lost."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path

import pytest
from urllib3 import HTTPResponse as Response

from certificates import PrivateCA
from tensorserve.sources.wire import Body

HEADER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
DATA = bytes(range(256)) * 400  # seven records


@contextmanager
def body(directory: Path, send: Callable[[ssl.SSLSocket], None]) -> Iterator[Body]:
    """A body of 1 MB, of which `send` gives as much as it likes, through real TLS."""
    ca = PrivateCA(directory)
    near, far = socket.socketpair()
    near.settimeout(0.3)

    def serve() -> None:
        with ca.context().wrap_socket(far, server_side=True) as tls:
            tls.sendall(HEADER)
            send(tls)

    server = threading.Thread(target=serve)
    server.start()
    trusting = ssl.create_default_context(cafile=str(ca.bundle))
    with trusting.wrap_socket(near, server_hostname="127.0.0.1") as tls:
        raw = HTTPResponse(tls)
        raw.begin()
        yield Body(Response(raw, preload_content=False), 0.3)
    server.join(10)


def gathered(source: Body, wanted: int) -> tuple[bytes, int]:
    """(the first `wanted` bytes, in how many calls)."""
    buffer, done, calls = memoryview(bytearray(1_000_000)), 0, 0
    while done < wanted:
        count = source.fill(buffer[done:])
        assert count
        done, calls = done + count, calls + 1
    return bytes(buffer[:done]), calls


def test_records_come_together(tmp_path: Path) -> None:
    """In one call, once what came along with the header is used up."""
    hold = threading.Event()

    def send(tls: ssl.SSLSocket) -> None:
        tls.sendall(DATA)
        hold.wait(10)

    with body(tmp_path, send) as source:
        data, calls = gathered(source, len(DATA))
        hold.set()
    assert data == DATA
    assert calls <= 3


@pytest.mark.parametrize("broken", [False, True])
def test_what_came_before_an_end_or_a_stall_is_given_first(tmp_path: Path, broken: bool) -> None:
    """The failure is told by the call after."""
    hold = threading.Event()

    def send(tls: ssl.SSLSocket) -> None:
        tls.sendall(DATA)
        if not broken:
            hold.wait(10)

    with body(tmp_path, send) as source:
        data, _ = gathered(source, len(DATA))
        assert data == DATA
        rest = memoryview(bytearray(10))
        if broken:
            assert source.fill(rest) == 0
        else:
            with pytest.raises(TimeoutError):
                source.fill(rest)
        hold.set()
