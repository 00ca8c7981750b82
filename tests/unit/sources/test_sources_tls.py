"""TLS and addresses: a private CA, no way back from https, and metadata hosts in disguise."""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
from contextlib import suppress

import pytest

from certificates import PrivateCA
from faultserver import Asked, FaultServer, Reply
from tensorserve.errors import ConfigurationError, SourceUnavailableError
from tensorserve.loading import LoadProgress
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy, S3Access, open_source

DATA = os.urandom(200_000)
POLICY = RetryPolicy(attempts=2, deadline=3, connect_timeout=1, stall_timeout=1, backoff_base=0.01)


def answer(asked: Asked) -> Reply:
    """DATA."""
    last = min(asked.last, len(DATA) - 1)
    headers = {"Content-Range": f"bytes {asked.first}-{last}/{len(DATA)}", "ETag": '"a"'}
    return Reply(206, headers, DATA[asked.first : last + 1])


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> PrivateCA:
    """A CA that nobody trusts by default."""
    return PrivateCA(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def context(ca: PrivateCA) -> ssl.SSLContext:
    """The server's side."""
    return ca.context()


def s3_access(server: FaultServer, ca_bundle: str | None) -> Access:
    """S3 over TLS."""
    s3 = S3Access(
        endpoint_url=server.url,
        region="us-east-1",
        ca_bundle=ca_bundle,
        access_key_id=Secret("id"),
        secret_access_key=Secret("s"),
    )
    return Access(s3=s3, policy=POLICY)


def test_s3_behind_a_private_ca_is_read_with_its_bundle(
    context: ssl.SSLContext, ca: PrivateCA
) -> None:
    """F16: AWS_CA_BUNDLE."""
    with FaultServer(answer, tls=context) as server:
        source = open_source("s3://b/m", s3_access(server, str(ca.bundle)))
        assert source.read(100_000, 50_000) == DATA[100_000:150_000]


def test_http_behind_a_private_ca_is_read_with_ssl_cert_file(
    context: ssl.SSLContext, ca: PrivateCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16: what the hint of the error says does work."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    with FaultServer(answer, tls=context) as server:
        source = open_source(f"{server.url}/m", Access(policy=POLICY))
        assert source.read(0, len(DATA)) == DATA


class SmallRecords(threading.Thread):
    """A server whose answers are many small TLS records, sent as one, after which it is silent."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(daemon=True)
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> SmallRecords:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self) -> None:
        """Until the socket is closed."""
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        came, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(came, sent, server_side=True)
        text = b""
        with connection, suppress(OSError, ssl.SSLError):
            done = False
            while True:
                try:
                    if not done:
                        tls.do_handshake()
                        done = True
                    text += tls.read()
                except ssl.SSLWantReadError:
                    connection.sendall(sent.read())
                    data = connection.recv(65536)
                    if not data:
                        return
                    came.write(data)
                if b"\r\n\r\n" in text:
                    found = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", text)
                    assert found
                    first, last = int(found[1]), min(int(found[2]), len(DATA) - 1)
                    text = b""
                    answer = (
                        f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/"
                        f'{len(DATA)}\r\nETag: "a"\r\nContent-Length: {last + 1 - first}\r\n\r\n'
                    ).encode() + DATA[first : last + 1]
                    for at in range(0, len(answer), 300):
                        tls.write(answer[at : at + 300])
                    connection.sendall(sent.read())


def test_records_that_were_read_ahead_are_not_waited_for(
    context: ssl.SSLContext, ca: PrivateCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What OpenSSL has of them, no poll of the socket tells of: a read would stall, and go on
    with another request.
    """
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    progress = LoadProgress()
    with SmallRecords(context) as server:
        source = open_source(f"{server.url}/m", Access(policy=POLICY), progress)
        for _ in range(5):  # over one connection
            assert source.read(70_001, 100_000) == DATA[70_001:170_001]
        source.close()
    assert progress.snapshot().retries == {}


def test_a_private_ca_that_is_not_trusted_is_said_as_such(context: ssl.SSLContext) -> None:
    """F16: it does not pass, so nothing is tried again."""
    with (
        FaultServer(answer, tls=context) as server,
        pytest.raises(
            SourceUnavailableError, match=r"(?s)certificate verify failed.*AWS_CA_BUNDLE"
        ),
    ):
        open_source("s3://b/m", s3_access(server, None))
    assert not server.requests


def test_a_ca_bundle_that_does_not_exist_is_said_as_such(context: ssl.SSLContext) -> None:
    """A mistake in the settings (78), with its path and the variables that name it."""
    with (
        FaultServer(answer, tls=context) as server,
        pytest.raises(ConfigurationError, match=r"(?s)No such file.*AWS_CA_BUNDLE"),
    ):
        open_source("s3://b/m", s3_access(server, "/nowhere/ca.pem"))


def test_a_redirect_from_https_to_http_is_refused(
    context: ssl.SSLContext, ca: PrivateCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F17: weights (and what stands in the URL) do not leave TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    with FaultServer(answer) as plain:
        away = Reply(302, {"Location": f"{plain.url}/m"})
        with (
            FaultServer(lambda _: away, tls=context) as server,
            pytest.raises(ConfigurationError, match="from https to plain http"),
        ):
            open_source(f"{server.url}/m", Access(policy=POLICY))
        assert server.fired["302"] == 1
        assert not plain.requests


@pytest.mark.parametrize(
    "host",
    ["[::ffff:169.254.169.254]", "2852039166", "0xa9fea9fe", "[fd00:ec2::254]", "169.254.170.2"],
)
def test_a_metadata_address_is_known_in_any_form(host: str) -> None:
    """A8: what the name resolves to is checked, not how it is written."""
    with pytest.raises(ConfigurationError, match="credentials"):
        open_source(f"http://{host}/m", Access(policy=POLICY))


def test_a_host_that_is_allowed_by_name_is_asked() -> None:
    """A8: whoever means it can say so; case does not matter in names."""
    allowed = Access(policy=POLICY, allowed_hosts=frozenset({"FE80::1"}))
    with pytest.raises(SourceUnavailableError):
        open_source("http://[fe80::1]:9/m", allowed)
