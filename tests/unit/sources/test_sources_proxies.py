"""Reads go through the proxies that the environment names, HTTP and S3 alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import PrivateCA
from fronts import Front
from rangeserver import RangeServer
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources import Access, RetryPolicy, open_source
from tensorserve.sources.proxies import ProxyRule, parse_proxy

POLICY = RetryPolicy(attempts=2, deadline=5, connect_timeout=1, stall_timeout=2, backoff_base=0.01)
DATA = os.urandom(200_000)


@pytest.fixture(autouse=True)
def no_other_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a test sets."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[RangeServer]:
    """A server of one file."""
    (tmp_path / "m").write_bytes(DATA)
    with RangeServer(tmp_path) as running:
        yield running


def port_of(server: RangeServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_an_http_source_is_read_through_its_proxy(
    upstream: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole URL in the request line, for a host that only the proxy knows."""
    with Front(port_of(upstream)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        source = open_source("http://store.internal/m", Access(policy=POLICY))
        assert source.read(0, len(DATA)) == DATA
    assert {seen.target for seen in proxy.seen} == {"http://store.internal/m"}
    assert {seen.headers["Host"] for seen in proxy.seen} == {"store.internal"}


def test_an_https_source_is_read_through_a_tunnel(
    upstream: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CONNECT with user and password; the proxy sees no request, the server no password."""
    ca = PrivateCA(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    with (
        Front(port_of(upstream), tls=ca.context()) as server,
        Front(0, tunnel=server.port, password="u:p") as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://u:p@127.0.0.1:{proxy.port}")
        source = open_source(f"{server.url}/m", Access(policy=POLICY))
        assert source.read(0, len(DATA)) == DATA
        source.close()
    assert {seen.method for seen in proxy.seen} == {"CONNECT"}
    assert server.seen
    assert not any("Proxy-Authorization" in seen.headers for seen in server.seen)


@pytest.mark.parametrize("behind", ["http", "https"])
def test_a_proxy_may_itself_be_reached_over_tls(
    behind: str, upstream: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """HTTP(S)_PROXY=https://…: requests within TLS, and TLS within TLS."""
    ca = PrivateCA(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.bundle))
    with (
        Front(port_of(upstream), tls=ca.context()) as server,
        Front(port_of(upstream), tunnel=server.port, tls=ca.context()) as proxy,
    ):
        monkeypatch.setenv(f"{behind.upper()}_PROXY", proxy.url)
        url = f"{server.url}/m" if behind == "https" else "http://store.internal/m"
        source = open_source(url, Access(policy=POLICY))
        assert source.read(0, len(DATA)) == DATA
        source.close()
    assert proxy.seen


@pytest.mark.parametrize(
    ("no_proxy", "url", "proxied"),
    [
        ("", "http://a.example/", True),
        ("a.example", "http://a.example/", False),
        ("a.example", "http://a.example:81/", False),
        ("a.example:81", "http://a.example:81/", False),
        ("a.example:81", "http://a.example:82/", True),
        (".example", "http://a.example/", False),
        ("example", "http://a.example/", False),
        ("ample", "http://a.example/", True),
        ("A.EXAMPLE", "http://a.example/", False),
        ("b.example, a.example", "http://a.example/", False),
        ("*", "http://a.example/", False),
        ("192.0.2.1", "http://192.0.2.1:9000/", False),
        ("192.0.2.0/24", "http://192.0.2.1/", True),
    ],
)
def test_no_proxy_is_read_as_urllib_reads_it(
    no_proxy: str, url: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, suffixes, addresses, ports and `*`; no ranges of addresses."""
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert (ProxyRule().proxy(url) is not None) == proxied
    assert (ProxyRule.for_url(url).proxy(url) is not None) == proxied


@pytest.mark.parametrize(
    ("text", "url", "authorization"),
    [
        ("proxy:3128", "http://proxy:3128", None),
        ("//proxy:3128", "http://proxy:3128", None),
        ("https://proxy", "https://proxy", None),
        ("http://u:p%40@proxy:1", "http://proxy:1", "Basic dTpwQA=="),
        ("u:p@proxy:1", "http://proxy:1", "Basic dTpw"),
    ],
)
def test_a_proxy_is_read_as_botocore_reads_it(
    text: str, url: str, authorization: str | None
) -> None:
    """With and without scheme and user."""
    proxy = parse_proxy(text)
    assert proxy.url == url
    assert proxy.headers.get("Proxy-Authorization") == authorization
    assert "p%40" not in repr(proxy)


@pytest.mark.parametrize("text", ["socks5://u:canary@proxy:1", "http://u:canary@proxy:x"])
def test_what_is_no_http_proxy_is_a_configuration_error(text: str) -> None:
    """Exit code 78, without the password."""
    with pytest.raises(ConfigurationError) as caught:
        parse_proxy(text)
    assert "canary" not in str(caught.value)


def test_a_proxy_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the server that was not asked, and nothing of the password."""
    monkeypatch.setenv("HTTP_PROXY", "http://u:canary@127.0.0.1:9")
    with pytest.raises(SourceUnavailableError, match=r"the proxy 127\.0\.0\.1:9") as caught:
        open_source("http://store.internal/m", Access(policy=POLICY))
    assert "canary" not in str(caught.value)


def test_a_proxy_that_lets_nothing_through_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """403 to CONNECT is an answer, not a fault."""
    with Front(0) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(PermissionDeniedError, match="does not allow connections to store"):
            open_source("https://store.internal/m", Access(policy=POLICY))
    assert len(proxy.seen) == 1


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "2852039166", "0xA9FEA9FE", "[fd00:ec2::254]", "metadata.google.internal"],
)
def test_a_proxy_is_not_asked_for_credentials_of_the_machine(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written as such an address is refused before a proxy could dial it."""
    with Front(0) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with pytest.raises(ConfigurationError, match="machines keep credentials"):
            open_source(f"http://{host}/m", Access(policy=POLICY))
        assert not proxy.seen


def test_a_redirect_to_such_an_address_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch, upstream: RangeServer
) -> None:
    """The proxy would follow where a server points."""
    upstream.redirects["m"] = "http://169.254.169.254/latest/meta-data/"
    with Front(port_of(upstream)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with pytest.raises(ConfigurationError, match="machines keep credentials"):
            open_source("http://store.internal/m", Access(policy=POLICY))
    assert len(proxy.seen) == 1
