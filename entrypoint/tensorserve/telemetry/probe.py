"""How is the engine asked whether it serves? The probe's URL, and the probe.

http, https: GET /health is answered by 200. tls: a handshake, where the engine demands a client
certificate and /health cannot be read without one; the server listens only while its engine lives.
tcp: a connection, as gRPC has no such page. With "+unix" the host is a socket's path,
percent-encoded. config/health_url.py makes the URL.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

PATH = "/health"
HTTP, HTTPS, TLS, TCP = SCHEMES = ("http", "https", "tls", "tcp")
UNIX = "+unix"
PROBE_TIMEOUT = 2.0
"""Seconds for each step of a probe; a busy engine answers /health in milliseconds."""


def split_health_url(url: str) -> tuple[str, str, int | None]:
    """(one of SCHEMES, host or path of a socket, port or None for a socket)."""
    scheme, _, rest = url.partition("://")
    if scheme.endswith(UNIX):
        return scheme.removesuffix(UNIX), unquote(rest.partition("/")[0]), None
    parts = urlsplit(url)
    return scheme, parts.hostname or "", parts.port


def socket_of(url: str) -> Path | None:
    """The Unix socket that the engine listens on; None where it listens on TCP."""
    _, place, port = split_health_url(url)
    return Path(place) if port is None and place else None


def answers(url: str) -> bool:
    """Whether the engine at `url` answers, within `PROBE_TIMEOUT` seconds a step. Never raises.

    http.client instead of urllib: it knows no proxies, no redirects and no `file:`.
    """
    try:
        scheme, place, port = split_health_url(url)
        with closing(_connected(place, port)) as plain:
            if scheme == TCP:
                return True
            if scheme == HTTP:
                return _says_ok(plain)
            # A server that wants a client certificate learns only afterwards that there is none
            # (TLS 1.3), and listens only while its engine lives.
            with closing(_open_tls(plain)) as sealed:
                return scheme == TLS or _says_ok(sealed)
    except (OSError, ValueError, http.client.HTTPException):
        return False  # it is not up yet, or has ended


def _connected(place: str, port: int | None) -> socket.socket:
    """A connection to a host's port, or to the Unix socket at `place`."""
    if port is not None:
        return socket.create_connection((place, port), PROBE_TIMEOUT)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(PROBE_TIMEOUT)
        connection.connect(place)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_tls(connection: socket.socket) -> ssl.SSLSocket:
    # The engine on this machine, with a certificate for its public name: the name cannot match, and
    # nothing is sent but the question.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def _says_ok(connection: socket.socket) -> bool:
    asked = http.client.HTTPConnection("localhost")
    asked.sock = connection
    asked.request("GET", PATH)
    return asked.getresponse().status == http.client.OK
