"""One request, by libcurl or by urllib3: what is taken, and what a failure is called."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from certificates import PrivateCA
from faultserver import Asked, FaultServer, Reply
from fronts import Front
from rangeserver import Fault, RangeServer
from tensorserve.errors import ConfigurationError, SourceUnavailableError
from tensorserve.sources import Access, RetryPolicy, open_source
from tensorserve.sources.curl import curl
from tensorserve.sources.curl_errors import as_told
from tensorserve.sources.curl_transport import CurlTransport
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.transport import Answer, Expected, Request, Transport, Verdict
from tensorserve.sources.urllib_transport import UrllibTransport
from waiting import wait_for

DATA = os.urandom(700_000)
ACCESS = Access(policy=RetryPolicy(connect_timeout=0.5, stall_timeout=1.0))
Make = Callable[..., Transport]


@pytest.fixture(params=["libcurl", "urllib3"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes transports, which are closed at the end."""
    made: list[Transport] = []

    def new(ca_bundle: str | None = None, rule: ProxyRule | None = None) -> Transport:
        rule = rule or ProxyRule.of({})
        if request.param == "libcurl":
            found = curl()
            assert found is not None, "libcurl or fetch.c is missing"
            made.append(CurlTransport(found, ACCESS, ca_bundle, rule, "the source"))
        else:
            made.append(UrllibTransport(ACCESS, ca_bundle, rule, "the source"))
        return made[-1]

    yield new
    for transport in made:
        transport.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    """DATA, at /m."""
    (tmp_path / "m").write_bytes(DATA)
    with RangeServer(tmp_path) as running:
        yield running


class Read:
    """A range that is read into `buffer`."""

    def __init__(self, first: int, last: int, verdict: Verdict = Verdict.TAKE) -> None:
        self.buffer = bytearray(last - first + 1)
        self.filling = Filling.of(memoryview(self.buffer))
        self.headers = {"Range": f"bytes={first}-{last}"}
        self.answers: list[Answer] = []
        self.received = 0
        self._verdict = verdict

    def judge(self, answer: Answer) -> tuple[Verdict, Filling | None]:
        """What becomes of the body; remembers the answer."""
        self.answers.append(answer)
        return self._verdict, self.filling if self._verdict is Verdict.TAKE else None

    def count(self, count: int) -> None:
        """`Request.received`."""
        self.received += count

    def of(self, url: str, expected: Expected | None = None, **headers: str) -> Request:
        """The request."""
        asked = self.headers | headers
        return Request(url, asked, False, self.judge, self.count, expected)


def test_a_range_is_received_and_the_connection_used_again(make: Make, server: RangeServer) -> None:
    """Its bytes, and no others."""
    transport = make()
    for first in (0, 5, 300_000):
        read = Read(first, first + 99_999)
        transport.get(read.of(f"{server.url}/m"))
        assert read.buffer == DATA[first : first + 100_000]
        assert read.received == 100_000
        assert [answer.status for answer in read.answers] == [206]
        assert read.answers[0].headers["content-RANGE"].startswith(f"bytes {first}-")


def test_parts_are_asked_for_as_they_begin(make: Make, server: RangeServer) -> None:
    """And after the one that is not wanted nothing is written."""
    read, parts, calls = Read(0, 2999), [bytearray(1000) for _ in range(3)], []

    def memory(number: int) -> memoryview:
        calls.append(number)
        return memoryview(parts[number])

    read.filling = Filling([1000] * 3, memory, lambda n: n < 1)
    make().get(read.of(f"{server.url}/m"))
    assert calls == [0, 1]
    assert b"".join(parts) == DATA[:2000] + bytes(1000)


def test_what_a_callback_raises_comes_out(make: Make, server: RangeServer) -> None:
    """Of the judge, and of a part that is full."""

    def fail(_: object) -> bool:
        raise KeyError("mine")

    read = Read(0, 9)
    read.judge = fail  # type: ignore[assignment,method-assign]
    transport = make()
    with pytest.raises(KeyError, match="mine"):
        transport.get(read.of(f"{server.url}/m"))
    read = Read(0, 9)
    read.filling = Filling([10], lambda _: memoryview(read.buffer), fail)
    with pytest.raises(KeyError, match="mine"):
        transport.get(read.of(f"{server.url}/m"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("short", "short_body"), ("reset", "reset"), ("stall", "stall"), ("trickle", "stall")],
)
def test_a_body_that_breaks_off_leaves_what_has_come(
    make: Make, server: RangeServer, kind: str, reason: str
) -> None:
    """So that the range goes on there."""
    server.faults = [Fault(kind, after=150_000)]
    read = Read(1, 400_000)
    with pytest.raises(TryAgain) as caught:
        make().get(read.of(f"{server.url}/m"))
    assert caught.value.reason == reason
    assert server.fired[kind] == 1
    done = read.filling.done
    assert done == read.received
    # A reset may overtake what was sent before it.
    assert 150_000 <= done < 400_000 or kind == "reset"
    assert read.buffer[:done] == DATA[1 : done + 1]


def test_a_late_read_is_broken_off_by_another_thread(make: Make, server: RangeServer) -> None:
    """At once, and called what it is."""
    policy_seconds, transport = 30.0, make()
    transport._policy = RetryPolicy(stall_timeout=policy_seconds)  # type: ignore[attr-defined]
    server.faults = [Fault("stall", after=1000)]
    read, raised = Read(1, 400_000), []

    def work() -> None:
        try:
            transport.get(read.of(f"{server.url}/m"))
        except TryAgain as error:
            raised.append(error.reason)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: server.fired["stall"] == 1)
    # The request may not be at its body yet.
    wait_for(lambda: transport.hurry(thread.ident or 0) or not thread.is_alive())
    thread.join(10)
    assert raised
    assert raised[0] in {"slow", "stall"}


@contextmanager
def answering(reply: Reply) -> Iterator[FaultServer]:
    with FaultServer(lambda _: reply) as running:
        yield running


def test_a_document_is_collected_where_it_is_wanted(make: Make) -> None:
    """And the connection is left alone where it is not."""
    with answering(Reply(403, {"X-A": "1"}, b"<why/>")) as server:
        read = Read(0, 9, Verdict.COLLECT)
        assert make().get(read.of(server.url)).document == b"<why/>"
        dropped = Read(0, 9, Verdict.DROP)
        reply = make().get(dropped.of(server.url))
    assert reply.answer is not None
    assert (reply.answer.status, reply.document) == (403, b"")
    assert not read.received
    assert not any(read.buffer)


def test_a_document_that_breaks_off_is_not_half_believed(make: Make) -> None:
    """It may lack the code."""
    with answering(Reply(403, {}, b"<why", promised=100)) as server:
        with pytest.raises(TryAgain) as caught:
            make().get(Read(0, 9, Verdict.COLLECT).of(server.url))
        assert caught.value.reason == "short_body"


# What is expected is taken without the judge ------------------------------------------------------

GOOD = {"Content-Range": "bytes 5-14/100", "ETag": '"a"'}


def asked_for(read: Read) -> Expected:
    return Expected("bytes 5-14/100", '"a"', 10, read.filling)


def test_what_is_expected_needs_no_judge() -> None:
    """Nothing of Python is called between request and answer."""
    found = curl()
    assert found is not None
    transport = CurlTransport(found, ACCESS, None, ProxyRule.of({}), "the source")
    with answering(Reply(206, GOOD, b"0123456789")) as server:
        read = Read(5, 14)
        transport.get(read.of(server.url, asked_for(read)))
    assert read.buffer == b"0123456789"
    assert not read.answers
    transport.close()


BAD = [
    Reply(200, GOOD, b"0123456789"),
    Reply(206, GOOD | {"Content-Range": "bytes 6-15/100"}, b"0123456789"),
    Reply(206, GOOD | {"Content-Range": "bytes 5-14/1000"}, b"0123456789"),
    Reply(206, GOOD | {"Content-Range": " bytes 5-14/100x"}, b"0123456789"),
    Reply(206, GOOD | {"ETag": '"b"'}, b"0123456789"),
    Reply(206, GOOD | {"ETag": 'W/"a"'}, b"0123456789"),
    Reply(206, {"ETag": '"a"'}, b"0123456789"),
    Reply(206, {"Content-Range": "bytes 5-14/100"}, b"0123456789"),
    Reply(206, GOOD | {"Content-Encoding": "gzip"}, b"0123456789"),
    Reply(206, GOOD | {"content-range": "bytes 0-9/100"}, b"0123456789"),
    Reply(206, GOOD | {"etag": '"b"'}, b"0123456789"),
    Reply(206, GOOD, b"0123456789abc"),
    Reply(206, GOOD, b"0123456789", promised=-1),
]


@pytest.mark.parametrize("reply", BAD)
def test_anything_else_is_judged_before_a_byte_is_taken(make: Make, reply: Reply) -> None:
    """Nothing is written where the judge says no."""
    with answering(reply) as server:
        read = Read(5, 14, Verdict.DROP)
        make().get(read.of(server.url, asked_for(read)))
        assert len(read.answers) == 1
        assert read.answers[0].status == reply.status
    assert not any(read.buffer)
    assert not read.received


# Connections --------------------------------------------------------------------------------------


def test_a_header_that_does_not_end_is_not_waited_for(make: Make) -> None:
    """However often a byte of it comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 206 Partial Content\r\nX: ")
                    while True:
                        connection.sendall(b"x")
                        threading.Event().wait(0.05)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TryAgain) as caught:
            make().get(Read(0, 9).of(f"http://127.0.0.1:{listener.getsockname()[1]}/"))
        thread.join(10)
    assert caught.value.reason == "stall"


@pytest.mark.parametrize("lines", [b"X: " + b"x" * 70_000, b"\r\n".join([b"X: y" * 10] * 2000)])
def test_a_header_that_is_too_long_is_a_broken_connection(make: Make, lines: bytes) -> None:
    """What it says is not looked at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                try:
                    connection.sendall(b"HTTP/1.1 206 OK\r\n" + lines + b"\r\n\r\n0123456789")
                    connection.recv(1)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        read = Read(0, 9)
        with pytest.raises(TryAgain) as caught:
            make().get(read.of(f"http://127.0.0.1:{listener.getsockname()[1]}/"))
        thread.join(10)
    assert caught.value.reason == "reset"
    assert not read.answers


def test_nobody_listens(make: Make) -> None:
    """Said with the host."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}/m"
        with pytest.raises(TryAgain, match="connection refused") as caught:
            make().get(Read(0, 9).of(url))
    assert caught.value.reason == "connect"


@pytest.fixture
def ca(tmp_path: Path) -> PrivateCA:
    return PrivateCA(tmp_path)


def tls_server(context: ssl.SSLContext) -> FaultServer:
    def answer(asked: Asked) -> Reply:
        return Reply(206, {"ETag": '"a"'}, DATA[asked.first : asked.last + 1])

    return FaultServer(answer, tls=context)


def test_a_private_ca_is_trusted_where_it_is_named(make: Make, ca: PrivateCA) -> None:
    """In TLS, and the connection is used again."""
    transport = make(str(ca.bundle))
    with tls_server(ca.context()) as server:
        for first in (0, 70_000):
            read = Read(first, first + 199_999)
            transport.get(read.of(f"{server.url}/m"))
            assert read.buffer == DATA[first : first + 200_000]


def test_a_private_ca_is_not_trusted_where_it_is_not(make: Make, ca: PrivateCA) -> None:
    """Nor is a certificate for another address."""
    with tls_server(ca.context()) as server:
        with pytest.raises(SourceUnavailableError, match="certificate verify failed"):
            make().get(Read(0, 9).of(f"{server.url}/m"))
        assert not server.requests
    with tls_server(ca.context("127.0.0.2")) as server:
        with pytest.raises(SourceUnavailableError, match="IP address mismatch"):
            make(str(ca.bundle)).get(Read(0, 9).of(f"{server.url}/m"))
        assert not server.requests


@pytest.mark.parametrize(
    "told",
    [
        "SSL certificate problem: certificate has expired",  # libcurl 7
        "SSL certificate OpenSSL verify result: certificate has expired (10)",  # libcurl 8
    ],
)
def test_a_refused_certificate_is_said_in_known_words(told: str) -> None:
    """Those of Python's ssl, whichever libcurl is here."""
    with pytest.raises(SourceUnavailableError) as raised:
        as_told(60, told, "a.example", "the source")
    assert raised.value.message == (
        "the source: TLS with a.example failed: certificate verify failed: certificate has expired."
    )


def test_a_bundle_that_is_none_is_said(make: Make, tmp_path: Path) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError, match="nowhere"):
        make(str(tmp_path / "nowhere")).get(Read(0, 9).of("https://127.0.0.1:9/m"))


def test_a_proxy_gets_its_password_and_the_server_does_not(
    make: Make, server: RangeServer, ca: PrivateCA
) -> None:
    """CONNECT for TLS."""
    port = int(server.url.rpartition(":")[2])
    with (
        Front(port, tls=ca.context()) as front,
        Front(0, tunnel=front.port, password="u:p") as proxy,
    ):
        rule = ProxyRule.of({"https": f"http://u:p@127.0.0.1:{proxy.port}"})
        read = Read(0, 99_999)
        make(str(ca.bundle), rule).get(read.of(f"{front.url}/m"))
    assert read.buffer == DATA[:100_000]
    assert [seen.method for seen in proxy.seen] == ["CONNECT"]
    assert not any("Proxy-Authorization" in seen.headers for seen in front.seen)


@pytest.mark.parametrize("bad", ["a\r\nX-Evil: 1", "a\nb"])
def test_a_line_break_in_a_header_is_not_sent(make: Make, server: RangeServer, bad: str) -> None:
    """A credential from a file may have one."""
    with pytest.raises(ConfigurationError, match="invalid character"):
        make().get(Read(0, 9).of(f"{server.url}/m", Authorization=bad))
    assert not server.requests


@pytest.mark.parametrize("way", ["libcurl", "urllib3"])
def test_a_source_says_what_brings_its_bytes(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Without libcurl everything works, and it is said: nobody would notice."""
    if way == "urllib3":
        monkeypatch.setattr("tensorserve.sources.http.curl", lambda: None)
    server.faults = [Fault("reset", after=100_000)]
    source = open_source(f"{server.url}/m", Access(policy=RetryPolicy(backoff_base=0.01)))
    assert source.transport == way
    # Those of TLS too: where several are installed, or LD_LIBRARY_PATH names one, it tells which.
    assert re.fullmatch(rf"{way} \d[\d.]+ with OpenSSL 3\.[\d.]+", source.library)
    assert source.read(1, len(DATA) - 1) == DATA[1:]
    assert server.fired["reset"] == 1
    source.close()
