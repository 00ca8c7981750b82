"""Which URLs may be asked: proper ones, and not hosts that hand out a machine's credentials."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from tensorserve.errors import ConfigurationError
from tensorserve.sources.retry import TryAgain

# Metadata services that do not lie in a link-local network.
_METADATA = frozenset(
    ipaddress.ip_address(a) for a in ("fd00:ec2::254", "100.100.100.200", "fd20:ce::254")
)


def host_and_port(url: str, what: str) -> tuple[str, int]:
    """Where `url` leads. Raises ConfigurationError if it is none, naming `what` instead of it.

    The URL is not shown, nor what Python says of it: a "/" in a password makes a part of the
    password the port.
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


def refuse_metadata(host: str, port: int, allowed: frozenset[str]) -> None:
    """Raise ConfigurationError if `host` is, or resolves to, a link-local or metadata address.

    A bundle's URI or a redirect could otherwise make this machine fetch its own credentials
    (169.254.169.254) and show them in an error. Raises TryAgain("dns") if it does not resolve.
    """
    if host.lower() in {name.lower() for name in allowed}:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise TryAgain("dns", f"the name {host!r} cannot be resolved ({error.strerror})") from error
    except UnicodeError as error:  # an empty label, or one too long
        raise ConfigurationError(f"{host!r} is not a host name.") from error
    for entry in found:
        address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if address.is_link_local or address in _METADATA:
            raise ConfigurationError(
                f"{host} is the link-local address {address}, where machines keep credentials.",
                hint=f"If a model is really there, set TENSORSERVE_ALLOWED_HOSTS={host}.",
            )
