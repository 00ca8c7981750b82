"""Can API and metrics listen where they are told to?"""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight.results import Passed
from tensorserve.telemetry import Check


def check_port(what: str, host: str, port: int) -> Passed:
    """`host:port` can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (UnicodeError, TypeError) as error:  # an empty label, one too long; bytes, not UTF-8
        raise ConfigurationError(f"The {what} cannot listen on {host!r}: no host name.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            variable = "TENSORSERVE_PORT" if what == "API" else "TENSORSERVE_METRICS_PORT"
            raise ConfigurationError(
                f"Port {port} on {host} is in use: the {what} cannot listen there.",
                hint=f"Stop what listens there, or set {variable} to a free port.",
            ) from error
        raise ConfigurationError(
            f"The {what} cannot listen on {host} port {port}: {error.strerror or error}."
        ) from error
    return Passed(Check(f"{what} port"), f"{host}:{port} is free")


def check_socket(path: Path) -> Passed:
    """A Unix socket can be bound at `path`. One without a listener is removed.

    vLLM leaves its own behind, and bind() then fails in a container that is started again.
    """
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise _no_socket(path, error) from error
    if found is not None and not stat.S_ISSOCK(found):
        raise ConfigurationError(
            f"The API cannot listen on {path}: something else is there.",
            hint="Remove it, or set TENSORSERVE_VLLM_UDS to another path.",
        )
    try:
        if found is not None:
            _refuse_listener(path)
            path.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.bind(str(path))
        path.unlink()
    except OSError as error:
        raise _no_socket(path, error) from error
    return Passed(Check.API_SOCKET, f"{path} can be bound")


def _refuse_listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left by a process that is gone
    raise ConfigurationError(
        f"Another process listens on {path}: the API cannot.",
        hint="Stop it, or set TENSORSERVE_VLLM_UDS to another path.",
    )


def _no_socket(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The API cannot listen on {path}: {error.strerror or error}.",
        hint=f"Its directory has to be there and writable by user {os.getuid()}: mount a volume "
        "that client and server share.",
    )
