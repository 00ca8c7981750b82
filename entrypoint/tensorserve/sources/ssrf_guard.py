"""Which URLs may be requested? Valid ones, except hosts of metadata services with credentials.

A name is resolved once for each connection, and the connection is made to the checked addresses
(header_timeout.py), so that a second DNS answer cannot differ. With a proxy, the proxy resolves and
connects; then only literal addresses and known names are checked.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from tensorserve.errors import ConfigurationError
from tensorserve.sources.retry import TryAgain

# Addresses of metadata services, from which machines get their credentials.
METADATA: tuple[IPv4Network | IPv6Network, ...] = (
    IPv4Network("169.254.0.0/16"),  # link-local: AWS, Google, Azure, Oracle and most others
    IPv6Network("fe80::/10"),  # link-local
    IPv4Network("100.100.100.200/32"),  # Alibaba
    IPv4Network("168.63.129.16/32"),  # Azure's wire server
    IPv4Network("192.0.0.192/32"),  # Oracle, older images
    IPv6Network("fd00:ec2::/32"),  # AWS: ::254 instances, ::23 pods
    IPv6Network("fd20:ce::254/128"),  # Google
    IPv6Network("fd00:c1::/32"),  # Oracle
    IPv6Network("fd00:42::42/128"),  # Scaleway
)
# Names of metadata services, refused whatever they resolve to.
_NAMES = frozenset(
    """metadata metadata.google.internal metadata.goog instance-data instance-data.ec2.internal
    metadata.azure.internal metadata.azure.com metadata.platformequinix.com
    metadata.tencentyun.com""".split()
)
# Prefixes whose last 32 bits are an IPv4 address: compatible, mapped, translated (RFC 2765), NAT64
# (RFC 6052, RFC 8215).
_ENDS_IN_V4 = tuple(
    map(
        IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
    )
)
_NAT64_LOCAL, _6TO4, _TEREDO = (
    IPv6Network("64:ff9b:1::/48"),
    IPv6Network("2002::/16"),
    IPv6Network("2001::/32"),
)


def host_and_port(url: str, what: str) -> tuple[str, int]:
    """(host, port) of `url`. Raises ConfigurationError for an invalid URL, which it calls `what`.

    The message has neither the URL nor Python's error: with a "/" in a password, Python takes part
    of the password for the port.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host:
        raise ConfigurationError(
            f"{what} is not a valid URL.",
            hint="Use http(s)://host[:port]/path, with %XX for special characters (%2F for a / in "
            "a password).",
        )
    return host, port or (443 if parts.scheme == "https" else 80)


def resolve(host: str, port: int, allowed: frozenset[str]) -> tuple[str, ...]:
    """The addresses of `host`, all of which are allowed.

    Raises ConfigurationError if `host` is, or resolves to, a link-local or metadata address: a
    bundle's URI or a redirect could otherwise make this machine fetch its own credentials and show
    them in an error. Names in `allowed` are exempt. Raises TryAgain("dns") if it does not resolve.
    """
    name = host.strip("[]").rstrip(".").lower()
    exempt = name in {each.rstrip(".").lower() for each in allowed}
    if name in _NAMES and not exempt:
        raise _refusal(host, "a name of the service")
    try:
        # getaddrinfo also parses 2852039166, 0xA9FEA9FE and 0251.0376.0251.0376, as browsers do.
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise TryAgain("dns", f"the name {host!r} cannot be resolved ({error.strerror})") from error
    except (UnicodeError, ValueError, TypeError) as error:  # an empty label, one too long, a NUL
        raise ConfigurationError(f"{host!r} is not a host name.") from error
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    for text in () if exempt else addresses:
        if hands_out_credentials(text):
            raise _refusal(host, f"the link-local or metadata address {text}")
    return addresses


def refuse_written(host: str, allowed: frozenset[str]) -> None:
    """Raises ConfigurationError if `host` is the literal address or a name of a metadata service.

    For requests through a proxy, which resolves other names itself.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name in {each.rstrip(".").lower() for each in allowed}:
        return
    if name in _NAMES:
        raise _refusal(host, "a name of the service")
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):  # a name (gaierror), or an invalid one (UnicodeError)
        return
    for entry in found:
        if hands_out_credentials(str(entry[4][0])):
            raise _refusal(host, f"the link-local or metadata address {entry[4][0]}")


def hands_out_credentials(text: str) -> bool:
    """Whether the address `text` is a metadata service's, also embedded in an IPv6 address."""
    address = ip_address(text.partition("%")[0])
    return any(
        each in network
        for each in (address, *_embedded(address))
        for network in METADATA
        if each.version == network.version
    )


def _embedded(
    address: IPv4Address | IPv6Address,
) -> Iterator[IPv4Address]:
    """The IPv4 addresses that may be embedded in an IPv6 address."""
    if isinstance(address, IPv4Address):
        return
    number = int(address)

    def v4(value: int) -> IPv4Address:
        return IPv4Address(value & 0xFFFFFFFF)

    if any(address in network for network in _ENDS_IN_V4):
        yield v4(number)
    if address in _NAT64_LOCAL:  # RFC 6052, 2.2: bits 64 to 71 are left out
        for prefix in (48, 56, 64):
            without = (number >> 64 << 56) | (number & (1 << 56) - 1)
            yield v4(without >> (120 - prefix - 32))
    if address in _6TO4:
        yield v4(number >> 80)
    if address in _TEREDO:
        yield v4(number >> 64)
        yield v4(~number)
    if number >> 32 & 0xFFFFFFFF in {0x5EFE, 0x02005EFE}:  # ISATAP
        yield v4(number)


def _refusal(host: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{host} is {what}, where machines keep credentials.",
        hint=f"If this host does serve the model, set TENSORSERVE_ALLOWED_HOSTS={host}.",
    )
