"""F16 and F17: names, connections, TLS and redirects on the way to a real S3 server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import command
from loading import Load, load
from proxy import FaultProxy, WireProxy
from s3server import S3Server, free_ports
from stored import ATTEMPTS, BUCKET, MIB, POLICY, Stored

from certificates import PrivateCA
from rangeserver import RangeServer
from s3_clients import s3_client
from tensorserve.errors import ConfigurationError, CorruptError, SourceUnavailableError
from tensorserve.sources import Access, list_names
from tensorserve.sources.base import Unobserved
from waiting import wait_for


def unavailable(stored: Stored, access: Access) -> tuple[str, dict[str, int]]:
    """What is said, and what was retried, when the load ends with exit code 69."""
    partial = Load()
    with pytest.raises(SourceUnavailableError) as caught:
        load(stored.uri, access, stored.key, partial)
    assert caught.value.exit_code == 69
    assert not partial.digests
    return str(caught.value), partial.retries


# F16: names and connections -----------------------------------------------------------------------


def test_f16_a_name_that_does_not_resolve(stored: Stored) -> None:
    """F16: retried to the end, and said as what it is."""
    patient = replace(POLICY, deadline=60)
    text, retries = unavailable(stored, stored.access("http://no-such-host.invalid:8333", patient))
    assert "'no-such-host.invalid' cannot be resolved" in text
    assert retries == {"dns": ATTEMPTS - 1}


def test_f16_a_name_that_resolves_later(
    stored: Stored, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16: in a cluster, name servers come late."""
    resolve, asked = socket.getaddrinfo, []

    def late(host: Any, *rest: Any, **named: Any) -> Any:
        if host != "store.test":
            return resolve(host, *rest, **named)
        asked.append(host)
        if len(asked) <= 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1", *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", late)
    done = load(stored.uri, stored.access(f"http://store.test:{proxy.port}"), stored.key)
    assert done.digests == stored.digests
    assert done.retries == {"dns": 3}
    assert len(asked) > 3


def test_f16_nobody_listens(stored: Stored) -> None:
    """F16: retried to the end, and said as what it is."""
    (port,) = free_ports(1)
    text, retries = unavailable(stored, stored.access(f"http://127.0.0.1:{port}"))
    assert f"127.0.0.1:{port}: connection refused" in text
    assert retries == {"connect": ATTEMPTS - 1}


def test_f16_a_server_that_listens_later(stored: Stored) -> None:
    """F16: the storage's pod starts after ours."""
    (port,) = free_ports(1)
    access = stored.access(f"http://127.0.0.1:{port}", replace(POLICY, attempts=None, deadline=20))
    done = Load()
    loading = threading.Thread(target=load, args=(stored.uri, access, stored.key, done))
    loading.start()
    wait_for(lambda: done.retries.get("connect", 0) >= 2)
    with FaultProxy(stored.s3.endpoint_url, port=port):
        loading.join(30)
    assert done.digests == stored.digests
    assert done.retries.keys() == {"connect"}


def test_f16_a_server_that_is_restarted(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16: the storage is updated: however often a connection is refused, the deadline governs."""
    policy = replace(POLICY, attempts=None, deadline=60)
    done, listed, refused = Load(), [], threading.Event()
    with S3Server(tmp_path) as server:
        server.make_bucket(BUCKET)
        s3_client(server).put_object(Bucket=BUCKET, Key=stored.name, Body=stored.data)
        away = replace(stored, s3=server)
        access = away.access(server.endpoint_url, policy)
        server.stop()
        monkeypatch.setattr("tensorserve.sources.s3.Unobserved", lambda: Refused(refused))
        folder = stored.uri.rpartition("/")[0]
        threads = [
            threading.Thread(target=load, args=(stored.uri, access, stored.key, done)),
            threading.Thread(target=lambda: listed.append(list_names(folder, access))),
        ]
        for thread in threads:
            thread.start()
        # More often than the twelve times that once ended it.
        wait_for(lambda: done.retries.get("connect", 0) > 12, 50)
        wait_for(refused.is_set, 50)
        server.start()
        for thread in threads:
            thread.join(50)
    assert done.digests == stored.digests
    assert listed == [{"model.tensors": len(stored.data)}]


class Refused(Unobserved):
    """Says when a listing was refused for the first time."""

    def __init__(self, seen: threading.Event) -> None:
        self._seen = seen

    def retry(self, _reason: str) -> None:
        self._seen.set()


def test_f16_a_connection_that_is_never_made(stored: Stored) -> None:
    """F16: a firewall that drops packets: nobody says no. A full backlog does the same."""
    policy = replace(POLICY, attempts=3, connect_timeout=0.2)
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        port = deaf.getsockname()[1]
        text, retries = unavailable(stored, stored.access(f"http://127.0.0.1:{port}", policy))
    assert f"no connection to 127.0.0.1:{port} in time" in text
    assert retries == {"connect": 2}


# F16: TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> PrivateCA:
    """Known to nobody."""
    return PrivateCA(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def tls(stored: Stored, ca: PrivateCA) -> Iterator[FaultProxy]:
    """The S3 server behind TLS."""
    with FaultProxy(stored.s3.endpoint_url, tls=ca.context()) as running:
        yield running


def trusting(stored: Stored, url: str, ca: PrivateCA, **policy: Any) -> Access:
    """With the private CA's bundle."""
    return stored.access(url, replace(POLICY, **policy), ca_bundle=str(ca.bundle))


def test_f16_a_private_ca_is_trusted_where_it_is_named(
    stored: Stored, tls: FaultProxy, ca: PrivateCA
) -> None:
    """F16: and the faults of the transport are survived within TLS as without."""
    for kind in ("reset", "short", "stall"):
        tls.add(kind, after=200_000)
    access = trusting(stored, tls.url, ca, stall_timeout=0.3)
    done = load(stored.uri, access, stored.key, connections=1)
    assert done.digests == stored.digests
    assert tls.fired == {"reset": 1, "short": 1, "stall": 1}
    assert sum(done.retries.values()) >= 3
    assert done.retries["stall"] >= 1


def test_f16_a_private_ca_that_is_not_named(stored: Stored, tls: FaultProxy) -> None:
    """F16: it does not pass, so it is not retried; the message names the variables."""
    text, retries = unavailable(stored, stored.access(tls.url))
    assert "certificate verify failed" in text
    assert "AWS_CA_BUNDLE" in text
    assert not retries
    assert not tls.requests


def test_f16_a_private_ca_and_the_commands(stored: Stored, tls: FaultProxy, ca: PrivateCA) -> None:
    """F16: AWS_CA_BUNDLE in the environment, for ranges and for listing; else exit code 69."""
    uri = f"s3://{BUCKET}/{stored.name.rpartition('/')[0]}"
    code, text = command(stored, tls, "verify", uri, AWS_CA_BUNDLE=str(ca.bundle))
    assert code == 0, text
    code, text = command(stored, tls, "verify", uri)
    assert code == 69
    assert "certificate verify failed" in text


@pytest.mark.parametrize(
    ("address", "expired", "said"),
    [("127.0.0.1", True, "certificate has expired"), ("127.0.0.2", False, "IP address mismatch")],
)
def test_f16_a_certificate_that_is_not_valid(
    stored: Stored, ca: PrivateCA, address: str, expired: bool, said: str
) -> None:
    """F16: said with OpenSSL's reason; not retried."""
    with FaultProxy(stored.s3.endpoint_url, tls=ca.context(address, expired=expired)) as server:
        text, retries = unavailable(stored, trusting(stored, server.url, ca))
    assert said in text
    assert not retries
    assert not server.requests


def test_f16_a_server_that_speaks_no_tls(stored: Stored, proxy: FaultProxy, ca: PrivateCA) -> None:
    """F16: https:// where http:// was meant; not retried."""
    text, retries = unavailable(stored, trusting(stored, f"https://127.0.0.1:{proxy.port}", ca))
    assert f"TLS with 127.0.0.1:{proxy.port} failed" in text
    assert not retries


@pytest.mark.parametrize(
    ("kind", "after", "reasons"),
    [
        ("flip", 900, {"tls"}),
        ("flip", 400_000, {"tls"}),
        ("cut", 100, {"tls", "reset"}),
        ("cut", 400_000, {"tls", "reset", "short_body"}),
        ("silent", 0, {"connect", "stall"}),
    ],
)
def test_f16_tls_that_breaks_is_made_again(
    stored: Stored, tls: FaultProxy, ca: PrivateCA, kind: str, after: int, reasons: set[str]
) -> None:
    """F16: in the handshake or in the middle, by a flipped bit, an end, or silence."""
    with WireProxy(tls.port, kind, after=after) as wire:
        access = trusting(stored, f"https://127.0.0.1:{wire.port}", ca, connect_timeout=2.0)
        done = load(stored.uri, access, stored.key)
    assert done.digests == stored.digests
    assert wire.fired == {kind: 1}
    assert len(done.retries) == 1
    assert done.retries.keys() <= reasons
    assert sum(done.retries.values()) == 1


# F17 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    """The file on an ordinary web server."""
    directory = tmp_path_factory.mktemp("web")
    (directory / "model.tensors").write_bytes(stored.data)
    with RangeServer(directory) as running:
        yield running


def secrets_in(headers: dict[str, str]) -> list[str]:
    """Headers that must not go to another host."""
    unwanted = ("authorization", "x-amz", "cookie")
    return [name for name in headers if name.lower().startswith(unwanted)]


def test_f17_a_redirect_is_followed_without_the_password(stored: Stored, web: RangeServer) -> None:
    """F17: plain HTTP; the other host learns nothing, and the faults there are survived."""
    web.requests.clear()
    with FaultProxy(web.url) as mirror, FaultProxy(web.url) as front:
        front.add(
            "status",
            code=302,
            times=0,
            beyond=0,
            headers={"Location": f"{mirror.url}/model.tensors"},
        )
        mirror.add("reset", times=2, after=100_000)
        uri = f"http://user:canary@127.0.0.1:{front.port}/model.tensors"
        done = load(uri, Access(policy=POLICY), stored.key)
    assert done.digests == stored.digests
    assert front.fired["status"] == len(front.requests) == len(mirror.requests)
    assert mirror.fired == {"reset": 2}
    assert done.retries == {"reset": 2}
    assert all("Authorization" in r.headers for r in front.requests)
    assert not [r for r in mirror.requests if secrets_in(dict(r.headers))]


def test_f17_s3_redirects_to_a_presigned_url(stored: Stored, proxy: FaultProxy) -> None:
    """F17: as gateways do; neither signature nor session of ours goes along."""
    presigned = s3_client(stored.s3).generate_presigned_url(
        "get_object", {"Bucket": BUCKET, "Key": stored.name}, ExpiresIn=600
    )
    with FaultProxy(stored.s3.endpoint_url) as gate:
        gate.host = f"127.0.0.1:{stored.s3.port}"
        there = presigned.replace(f":{stored.s3.port}/", f":{gate.port}/")
        proxy.add("status", code=307, times=0, beyond=0, headers={"Location": there})
        done = load(stored.uri, stored.access(proxy.url), stored.key)
        assert done.digests == stored.digests
        assert proxy.fired["status"] == len(proxy.requests)
        assert all("Authorization" in r.headers for r in proxy.requests)
        assert not [r for r in gate.requests if secrets_in(dict(r.headers))]


def test_f17_a_redirect_to_another_object_is_not_mixed_in(
    stored: Stored, other: Stored, proxy: FaultProxy
) -> None:
    """F17 and F6: from the middle on, a mirror that has another version. Exit code 65."""
    presigned = s3_client(stored.s3).generate_presigned_url(
        "get_object", {"Bucket": BUCKET, "Key": other.name}, ExpiresIn=600
    )
    proxy.add("status", code=307, times=0, beyond=8 * MIB, headers={"Location": presigned})
    partial = Load()
    with pytest.raises(CorruptError, match="was replaced") as caught:
        load(stored.uri, stored.access(proxy.url), stored.key, partial)
    assert caught.value.exit_code == 65
    assert partial.digests.items() < stored.digests.items()
    assert proxy.fired["status"] >= 1


@pytest.mark.parametrize("beyond", [0, 8 * MIB])
@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://169.254.169.254/latest/meta-data/iam", "169.254.169.254"),
        ("file:///etc/passwd", "not HTTP"),
    ],
)
def test_f17_a_redirect_out_of_the_policy_is_refused(
    stored: Stored, web: RangeServer, beyond: int, location: str, said: str
) -> None:
    """F17: at the first look and in the middle; exit code 78, and nothing is sent there."""
    partial = Load()
    with FaultProxy(web.url) as front:
        front.add("status", code=302, times=0, beyond=beyond, headers={"Location": location})
        with pytest.raises(ConfigurationError, match=said) as caught:
            load(f"{front.url}/model.tensors", Access(policy=POLICY), stored.key, partial)
    assert caught.value.exit_code == 78
    assert partial.digests.items() < stored.digests.items()
    assert front.fired["status"] >= 1


def test_f17_a_redirect_from_https_to_http_is_refused(
    stored: Stored, web: RangeServer, ca: PrivateCA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F17: exit code 78."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    web.requests.clear()
    with FaultProxy(web.url, tls=ca.context()) as front:
        away = {"Location": f"{web.url}/model.tensors"}
        front.add("status", code=302, beyond=0, headers=away)
        with pytest.raises(ConfigurationError, match="from https to plain http") as caught:
            load(f"{front.url}/model.tensors", Access(policy=POLICY), stored.key)
    assert caught.value.exit_code == 78
    assert front.fired == {"status": 1}
    assert not web.requests


def test_f17_redirects_without_end(stored: Stored, web: RangeServer) -> None:
    """F17: exit code 69 after a few."""
    with FaultProxy(web.url) as front:
        front.add("status", code=302, times=0, beyond=0, headers={"Location": "/model.tensors"})
        access = Access(policy=POLICY)
        partial = Load()
        with pytest.raises(SourceUnavailableError, match="redirects"):
            load(f"{front.url}/model.tensors", access, stored.key, partial)
    assert not partial.digests
    assert 2 <= front.fired["status"] <= 10
