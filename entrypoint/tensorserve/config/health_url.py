"""Where does the engine answer whether it serves? `vllm serve` flags → one URL for the probe.

telemetry/probe.py says what the URL means. The flags that decide it, in vLLM 0.32.0
(vllm/entrypoints): launchers/launcher.py binds `--uds`, else `--host` and `--port`; uvicorn speaks
TLS where a certificate is given; cli/serve.py starts another server for
`--data-parallel-multi-port-external-lb`, none for `--headless` and an `--api-server-count` below 1,
and gRPC instead of HTTP with `--grpc`. No other flag moves /health: the router drops `--root-path`,
`--api-key` does not guard /health, several API servers share one socket.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from tensorserve.errors import ConfigurationError
from tensorserve.telemetry.probe import HTTP, HTTPS, PATH, TCP, TLS, UNIX

# sun_path without its NUL: unix(7).
_LONGEST_SOCKET = 107
_CLIENT_CERTIFICATES = "2"  # ssl.CERT_REQUIRED
_SUPERVISOR_PORT = 9256
_PORT = re.compile(r"[0-9]{1,5}")


def health_url(
    wish: Callable[[str], str | None], given: Callable[[str], bool], host: str, port: int
) -> str:
    """How readiness is probed: a URL as telemetry/probe.py reads it.

    `wish` gives a flag's value, `given` says whether a flag is there; `host` and `port` are those
    of vLLM's API. Raises ConfigurationError for flags with which vLLM itself could not serve.
    """
    certificate = wish("ssl-certfile")
    if wish("ssl-keyfile") and not certificate:
        raise ConfigurationError(
            "--ssl-keyfile without --ssl-certfile: vLLM ends with that, after the model is loaded.",
            hint="Set TENSORSERVE_VLLM_SSL_CERTFILE too; one file may hold both.",
        )
    scheme = HTTP
    if certificate:
        scheme = TLS if wish("ssl-cert-reqs") == _CLIENT_CERTIFICATES else HTTPS
    servers = wish("api-server-count")
    if servers is not None and re.fullmatch(r"-[0-9]+", servers):
        raise ConfigurationError(
            f"--api-server-count={servers} is no number of servers.",
            hint="Leave it out; 0 is for the further machines of several: see docs/kubernetes.md.",
        )
    if given("grpc"):
        return f"{TCP}://{_reachable(host)}:{port}{PATH}"
    if given("data-parallel-multi-port-external-lb"):
        # Each replica has a port of its own, and this one speaks for them all.
        text = wish("data-parallel-supervisor-port") or str(_SUPERVISOR_PORT)
        if not _PORT.fullmatch(text) or not 0 < int(text) < 65536:
            raise ConfigurationError(f"--data-parallel-supervisor-port {text[:40]!r} is no port.")
        return f"{scheme}://{_reachable(host)}:{int(text)}{PATH}"
    socket = wish("uds")
    if socket:
        return f"{scheme}{UNIX}://{quote(_checked_socket(socket), safe='')}{PATH}"
    return f"{scheme}://{_reachable(host)}:{port}{PATH}"


def _checked_socket(path: str) -> str:
    if not path.startswith("/"):
        raise ConfigurationError(
            f"--uds={path[:120]!r} is not an absolute path: the engine and what probes it stand in "
            "other directories.",
            hint="For example TENSORSERVE_VLLM_UDS=/run/vllm/api.sock.",
        )
    if len(path.encode(errors="surrogateescape")) > _LONGEST_SOCKET:
        raise ConfigurationError(
            f"--uds has {len(path.encode(errors='surrogateescape'))} bytes; the path of a socket "
            f"has {_LONGEST_SOCKET} at most.",
            hint="Choose a shorter one: TENSORSERVE_VLLM_UDS=/run/vllm/api.sock.",
        )
    return path


def _reachable(host: str) -> str:
    """The address at which this machine reaches a server that is bound to `host`."""
    if host in {"", "0.0.0.0", "*"}:
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
