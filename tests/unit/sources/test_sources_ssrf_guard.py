"""Which addresses are dialled: those that were looked at, and none that hands out credentials."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rangeserver import RangeServer
from tensorserve.errors import ConfigurationError
from tensorserve.sources import Access, RetryPolicy, open_source
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.ssrf_guard import hands_out_credentials, resolve

REFUSED = {
    "169.254.169.254": "AWS, Google, Azure and others",
    "169.254.170.2": "AWS, containers",
    "169.254.0.23": "Tencent",
    "100.100.100.200": "Alibaba",
    "168.63.129.16": "Azure's wire server",
    "192.0.0.192": "Oracle",
    "fe80::1": "link-local",
    "fe80::1%1": "link-local, with its interface",
    "fd00:ec2::254": "AWS",
    "fd00:ec2::23": "AWS, pods",
    "fd20:ce::254": "Google",
    "fd00:c1::a9fe:a9fe": "Oracle",
    "fd00:42::42": "Scaleway",
    "::ffff:169.254.169.254": "mapped",
    "::ffff:168.63.129.16": "mapped",
    "::ffff:0:169.254.169.254": "translated",
    "::169.254.169.254": "compatible",
    "64:ff9b::169.254.169.254": "NAT64",
    "64:ff9b::100.100.100.200": "NAT64",
    "64:ff9b:1::169.254.169.254": "NAT64 of one's own, /96",
    "64:ff9b:1:a9fe:a9:fe00::": "NAT64 of one's own, /48",
    "64:ff9b:1:ca9:fe:a9fe::": "NAT64 of one's own, /56",
    "64:ff9b:1:ca:a9:fea9:fe00:0": "NAT64 of one's own, /64",
    "2002:a9fe:a9fe::1": "6to4",
    "2001:0:a9fe:a9fe::1": "Teredo, its server",
    "2001:0:102:304:0:0:5601:5601": "Teredo, its client",
    "2001:db8::5efe:169.254.169.254": "ISATAP",
}
ALLOWED = [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "100.100.100.201", "168.63.129.17", "8.8.8.8",
    "::1", "2606:4700::1111", "fd00:1234::1", "64:ff9b::8.8.8.8", "2002:808:808::1",
    "::ffff:10.0.0.1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_that_hands_out_credentials_is_refused(address: str) -> None:
    """Directly, and in each IPv6 form that a translator turns into it."""
    assert hands_out_credentials(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_other_addresses_are_not(address: str) -> None:
    """Models lie on private networks."""
    assert not hands_out_credentials(address)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "2852039166",
        "0xA9FEA9FE",
        "0xa9.254.0xa9fe",
        "0251.0376.0251.0376",
        "169.254.43518",
        "[fe80::1]",
        "[::ffff:a9fe:a9fe]",
        "metadata.google.internal",
        "METADATA.google.internal.",
        "metadata",
        "instance-data.ec2.internal",
    ],
)
def test_no_spelling_of_a_host_leads_there(host: str) -> None:
    """Decimal, octal, hexadecimal and shortened IPv4 are what the C library resolves; and names."""
    with pytest.raises(ConfigurationError, match="credentials"):
        resolve(host, 80, frozenset())
    for scheme in ("http", "https"):
        with pytest.raises(ConfigurationError, match="credentials"):
            open_source(f"{scheme}://{host}/latest", Access())


@pytest.mark.parametrize("allowed", ["169.254.169.254", "metadata.google.internal"])
def test_a_host_that_the_user_names_is_allowed(allowed: str) -> None:
    """And no other."""
    with suppress(TryAgain):  # there may be no such name here
        resolve(allowed, 80, frozenset({allowed.upper()}))
    with pytest.raises(ConfigurationError):
        resolve("169.254.170.2", 80, frozenset({allowed}))


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "a\0b", ".".join(["a" * 60] * 6)])
def test_what_is_no_host_name_is_said(host: str) -> None:
    """Not Python's UnicodeError."""
    with pytest.raises((ConfigurationError, TryAgain)):
        resolve(host, 80, frozenset())


def answering(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """A name server that answers differently each time it is asked for rebind.test."""
    real, asked = socket.getaddrinfo, []

    def getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host != "rebind.test":
            return real(host, port, *rest, **named)
        given = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [entry for address in given for entry in real(address, port, *rest, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_the_address_that_is_dialled_is_the_one_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the second answer would be another machine, and nobody asks for it."""
    (tmp_path / "m").write_bytes(b"content")
    with RangeServer(tmp_path) as server:
        asked = answering(monkeypatch, ["127.0.0.1"], ["127.0.0.99"])
        url = server.url.replace("127.0.0.1", "rebind.test")
        source = open_source(f"{url}/m", Access(policy=RetryPolicy(attempts=1)))
        assert source.read(0, source.size) == b"content"
        source.close()
        assert len(asked) == 1
        assert server.requests[0][1]["Host"].startswith("rebind.test:")


def test_a_new_connection_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name now leads to a metadata service: no connection is made."""
    (tmp_path / "m").write_bytes(bytes(100_000))
    with RangeServer(tmp_path) as server:
        answering(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
        url = server.url.replace("127.0.0.1", "rebind.test")
        source = open_source(f"{url}/m", Access(policy=RetryPolicy(attempts=2, backoff_base=0.01)))
        source.close()  # its pool: the next read needs a connection
        with pytest.raises(ConfigurationError, match=r"169\.254"):
            source.read(0, source.size)


def test_one_bad_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers so has no good in mind."""
    answering(monkeypatch, ["127.0.0.1", "169.254.169.254"])
    with pytest.raises(ConfigurationError):
        resolve("rebind.test", 80, frozenset())


def test_a_host_of_several_addresses_is_reached_where_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As urllib3 does it with a name."""
    (tmp_path / "m").write_bytes(b"content")
    with RangeServer(tmp_path) as server:
        answering(monkeypatch, ["127.0.0.99", "127.0.0.1"])
        url = server.url.replace("127.0.0.1", "rebind.test")
        source = open_source(f"{url}/m", Access(policy=RetryPolicy(attempts=1)))
        assert source.size == 7
        source.close()
