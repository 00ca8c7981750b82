"""Bodies within TLS: records are gathered, and what fails behind them is not lost."""

from __future__ import annotations

import os
import signal
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
from tensorserve.sources import tls as within_tls
from tensorserve.sources.wire import Body

HEADER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
DATA = bytes(range(256)) * 400  # seven records


@pytest.fixture(params=["tls.c", "Python's ssl"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read; the second is for where nothing could be compiled."""
    if request.param != "tls.c":
        monkeypatch.setattr(within_tls, "_functions", lambda: None)
    return str(request.param)


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


def test_the_fast_way_is_taken_where_it_was_built(way: str) -> None:
    """Else nobody would notice that it is gone."""
    near, far = socket.socketpair()
    with ssl.create_default_context().wrap_socket(
        near, server_hostname="x", do_handshake_on_connect=False
    ) as tls:
        chosen = within_tls.receiver(tls, 1, 1000)
        assert (type(chosen.__self__).__name__ == "_Native") == (way == "tls.c")  # type: ignore[attr-defined]
    far.close()


def test_a_connection_that_cannot_be_found_is_read_by_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another Python may keep OpenSSL's pointer elsewhere: what stands beside it tells."""
    near, far = socket.socketpair()
    with ssl.create_default_context().wrap_socket(
        near, server_hostname="x", do_handshake_on_connect=False
    ) as tls:
        monkeypatch.setattr(within_tls.weakref, "getweakrefs", lambda _: [])
        chosen = within_tls.receiver(tls, 1, 1000)
        assert type(chosen.__self__).__name__ == "_Gathering"  # type: ignore[attr-defined]
    far.close()


def test_what_is_damaged_is_said_with_openssls_reason(tmp_path: Path) -> None:
    """After what came before it; bytes that are no record of TLS."""

    def send(tls: ssl.SSLSocket) -> None:
        tls.sendall(DATA)
        os.write(tls.fileno(), bytes(range(100, 200)))

    with body(tmp_path, send) as source:
        data, _ = gathered(source, len(DATA))
        assert data == DATA
        for _ in range(2):
            with pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
                source.fill(memoryview(bytearray(10)))


def test_a_signal_does_not_end_the_waiting(tmp_path: Path) -> None:
    """Python handles it at once; then the reading goes on."""
    heard = threading.Event()
    main = threading.get_ident()

    def send(tls: ssl.SSLSocket) -> None:
        while not heard.wait(0.02):
            signal.pthread_kill(main, signal.SIGUSR1)
        tls.sendall(DATA)

    before = signal.signal(signal.SIGUSR1, lambda *_: heard.set())
    try:
        with body(tmp_path, send) as source:
            data, _ = gathered(source, len(DATA))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert data == DATA
