"""Answers that lie, trickle or break off: what a server may say, and what is made of it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from faultserver import Asked, FaultServer, Reply
from rangeserver import Fault, RangeServer
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.sources import Access, RetryPolicy, Source, open_source

SIZE = 300_000
DATA = os.urandom(SIZE)
ATTEMPTS = 4
POLICY = RetryPolicy(
    attempts=ATTEMPTS, deadline=8.0, connect_timeout=1.0, stall_timeout=0.5, backoff_base=0.01
)
ACCESS = Access(policy=POLICY)


class Reasons:
    """A FetchObserver that remembers why requests were sent again."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def request(self) -> None: ...
    def received(self, count: int) -> None: ...

    def retry(self, reason: str) -> None:
        self.found.append(reason)


def partial(asked: Asked, **headers: str) -> Reply:
    """The right bytes of a range, with these headers."""
    last = min(asked.last, SIZE - 1)
    ranged = {"Content-Range": f"bytes {asked.first}-{last}/{SIZE}"}
    return Reply(206, ranged | {k.replace("_", "-"): v for k, v in headers.items()},
                 DATA[asked.first : last + 1])  # fmt: skip


def within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """What `read` gives or raises; TimeoutError if it goes on for longer."""
    outcome: Future[bytes] = Future()

    def run() -> None:
        try:
            outcome.set_result(read())
        except TensorserveError as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # it ends when the server has gone
    return outcome.result(seconds)


@contextmanager
def opened_then(
    later: Callable[[Asked], Reply], **headers: str
) -> Iterator[tuple[FaultServer, Source]]:
    """A server that opens well (with `headers`) and answers `later`; and the open source."""
    with FaultServer(lambda a: later(a) if a.number else partial(a, **headers)) as server:
        source = open_source(f"{server.url}/m", ACCESS)
        yield server, source
        source.close()


def test_a_trickle_without_end_ends_the_start(tmp_path: Path) -> None:
    """F3: a few bytes of each connection are no progress."""
    (tmp_path / "m").write_bytes(DATA)
    with RangeServer(tmp_path) as server:
        source = open_source(f"{server.url}/m", ACCESS)
        server.faults = [Fault("trickle", times=1000)]
        with pytest.raises(SourceUnavailableError, match="without progress"):
            within(POLICY.deadline, lambda: source.read(100_000, 100_000))
        assert server.fired["trickle"] == ATTEMPTS


@pytest.mark.parametrize("status", [503, 400, 403])
def test_a_broken_off_error_document_is_a_broken_connection(status: int) -> None:
    """F1: only our own errors come out, and the range is read in the end."""
    broken = Reply(status, {"ETag": '"a"'}, b"<Error>", promised=5000, label="half")
    with opened_then(lambda a: broken if a.number == 1 else partial(a, ETag='"a"'), ETag='"a"') as (
        server,
        source,
    ):
        assert source.read(100_000, 1000) == DATA[100_000:101_000]
        assert server.fired["half"] == 1


def test_an_error_document_that_trickles_does_not_hold_the_start() -> None:
    """F3: an error's body is not worth more patience than data."""
    slow = Reply(503, {}, bytes(2000), trickle_seconds=0.05, label="slow")
    with opened_then(lambda a: slow if a.number == 1 else partial(a, ETag='"a"'), ETag='"a"') as (
        server,
        source,
    ):
        assert within(5.0, lambda: source.read(100_000, 10)) == DATA[100_000:100_010]
        assert server.fired["slow"] == 1


def test_a_trickle_without_a_length_is_seen_too() -> None:
    """F3: where the server says no Content-Length, the watchdog watches all the same."""

    def slow(asked: Asked) -> Reply:
        good = partial(asked, ETag='"a"')
        if asked.number > 1:
            return good
        return Reply(206, good.headers, good.body, promised=-1, trickle_seconds=0.05, label="slow")

    with opened_then(slow, ETag='"a"') as (server, source):
        assert within(5.0, lambda: source.read(100_000, 1000)) == DATA[100_000:101_000]
        assert server.fired["slow"] == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": 'W/"a"'}, {"ETag": 'W/"b"'}),
        ({"ETag": '"a"'}, {"ETag": 'W/"a"'}),
        (
            {"Last_Modified": "Mon, 23 Nov 2026 10:00:00 GMT"},
            {"Last_Modified": "Mon, 23 Nov 2026 10:00:01 GMT"},
        ),
        (
            {"ETag": 'W/"a"', "Last_Modified": "Mon, 23 Nov 2026 10:00:00 GMT"},
            {"ETag": 'W/"b"', "Last_Modified": "Mon, 23 Nov 2026 10:00:00 GMT"},
        ),
    ],
)
def test_another_version_is_noticed_without_preconditions(
    before: dict[str, str], after: dict[str, str]
) -> None:
    """F6: a server that knows no If-Match is watched by what it says of each range."""
    with opened_then(lambda a: partial(a, **after), **before) as (server, source):
        with pytest.raises(CorruptError, match="replaced"):
            source.read(100_000, 1000)
        assert server.fired["206"] == 2


@pytest.mark.parametrize("header", [{"ETag": '"a"'}, {"ETag": 'W/"a"'}])
def test_a_range_without_its_version_is_not_used(header: dict[str, str]) -> None:
    """F6: silence is no proof that the object is the same."""
    with opened_then(partial, **header) as (server, source):
        with pytest.raises(SourceUnavailableError, match="version"):
            source.read(100_000, 1000)
        assert server.fired["206"] == 1 + ATTEMPTS


def test_another_size_is_another_version() -> None:
    """F6, where the server names no version at all."""

    def longer(asked: Asked) -> Reply:
        good = partial(asked)
        return Reply(206, {"Content-Range": good.headers["Content-Range"] + "0"}, good.body)

    with opened_then(longer) as (_, source), pytest.raises(CorruptError, match="replaced"):
        source.read(100_000, 1000)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(206, {"Content-Range": f"bytes 0-65535/{'9' * 5000}"}, bytes(65536)),
        Reply(200, {}, b"", promised=int("9" * 4000)),
        Reply(416, {"Content-Range": "bytes */300000"}),
    ],
    ids=["range", "length", "416"],
)
def test_absurd_sizes_at_open_are_refused(reply: Reply) -> None:
    """A1: with one of our errors."""
    with FaultServer(lambda _: reply) as server, pytest.raises(SourceUnavailableError):
        open_source(f"{server.url}/m", ACCESS)
    assert server.fired


BAD_URLS = [
    "http://[canary/m", "http://h:canary/m", "http://a..b/m", "http:///m", "http://u:canary/n@h/"
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_url_is_a_mistake_in_the_configuration(url: str) -> None:
    """Exit code 78, and nothing of what may be a password."""
    with pytest.raises(ConfigurationError) as caught:
        open_source(url, ACCESS)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("url", BAD_URLS[:3])
def test_a_redirect_to_what_is_no_url_is_refused(url: str) -> None:
    """F17: what a server says is not trusted to be a URL."""
    reply = Reply(302, {"Location": url})
    with FaultServer(lambda _: reply) as server, pytest.raises(ConfigurationError):
        open_source(f"{server.url}/m", ACCESS)
    assert server.fired["302"] == 1


def test_an_unreachable_redirect_names_the_host_that_failed() -> None:
    """F16, F17: the first host is well."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{holder.getsockname()[1]}"
    reply = Reply(302, {"Location": f"http://{there}/m"})
    with (
        FaultServer(lambda _: reply) as server,
        pytest.raises(SourceUnavailableError, match=there),
    ):
        open_source(f"{server.url}/m", ACCESS)


def test_a_tls_handshake_that_breaks_off_is_tried_again() -> None:
    """F16: a load balancer that starts closes connections; a bad certificate does not pass."""
    reasons = Reasons()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_all() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)

        threading.Thread(target=close_all, daemon=True).start()
        port = listener.getsockname()[1]
        with pytest.raises(SourceUnavailableError):
            open_source(f"https://127.0.0.1:{port}/m", ACCESS, reasons)
        listener.shutdown(socket.SHUT_RDWR)
    assert reasons.found == ["tls"] * (ATTEMPTS - 1)


def test_an_unknown_scheme_is_refused_without_showing_the_uri() -> None:
    """A5: a mistyped scheme must not print the password behind it."""
    with pytest.raises(ConfigurationError, match="'htps'") as caught:
        open_source("htps://user:canary@h/m?X-Amz-Signature=canary", ACCESS)
    assert "canary" not in str(caught.value)
