"""Which hosts may be asked: not those that hand out a machine's own credentials."""

from __future__ import annotations

import ipaddress
import socket

from tensorserve.errors import ConfigurationError
from tensorserve.sources.retry import TryAgain

# Metadata services that do not lie in a link-local network.
_METADATA = frozenset(
    ipaddress.ip_address(a) for a in ("fd00:ec2::254", "100.100.100.200", "fd20:ce::254")
)


def refuse_metadata(host: str, port: int, allowed: frozenset[str]) -> None:
    """Raise ConfigurationError if `host` is, or resolves to, a link-local or metadata address.

    A bundle's URI or a redirect could otherwise make this machine fetch its own credentials
    (169.254.169.254) and show them in an error. Raises TryAgain("dns") if it does not resolve.
    """
    if host in allowed:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise TryAgain("dns", f"the name {host!r} cannot be resolved ({error.strerror})") from error
    for entry in found:
        address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if address.is_link_local or address in _METADATA:
            raise ConfigurationError(
                f"{host} is the link-local address {address}, where machines keep credentials.",
                hint=f"If a model is really there, set TENSORSERVE_ALLOWED_HOSTS={host}.",
            )
