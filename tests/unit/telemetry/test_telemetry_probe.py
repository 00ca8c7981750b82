"""The exporter's probe against uvicorn, the server that vLLM runs, in each way it may listen."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn

from certificates import PrivateCA
from tensorserve.telemetry.probe import answers
from waiting import wait_for


@contextmanager
def serving(status: int = 200, **options: Any) -> Iterator[int | None]:
    """uvicorn with a /health that answers `status`; gives the port."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert scope["path"] == "/health"
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})

    listener = None
    if "uds" not in options:
        listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="critical", **options)
    server = uvicorn.Server(config)
    sockets = [listener] if listener else None
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield listener.getsockname()[1] if listener else None
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """uvicorn's options for a certificate that only a private CA knows."""
    ca = PrivateCA(tmp_path_factory.mktemp("ca"))
    certificate = str(ca.certificate())
    return {"ssl_certfile": certificate, "ssl_keyfile": certificate, "ssl_ca_certs": str(ca.bundle)}


def unix(scheme: str, path: Path) -> str:
    return f"{scheme}+unix://{quote(str(path), safe='')}/health"


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (302, False)])
def test_a_unix_socket_is_asked(tmp_path: Path, status: int, healthy: bool) -> None:
    """As --uds has it."""
    path = tmp_path / "api.sock"
    with serving(status, uds=str(path)):
        assert answers(unix("http", path)) is healthy
        assert not answers(unix("https", path))
    assert not answers(unix("http", path))


def test_tls_over_a_unix_socket_is_asked(tmp_path: Path, tls: dict[str, Any]) -> None:
    """--uds and --ssl-certfile together."""
    path = tmp_path / "api.sock"
    with serving(uds=str(path), **tls):
        assert answers(unix("https", path))
    with serving(uds=str(path), **tls, ssl_cert_reqs=2):
        assert not answers(unix("https", path))
        assert answers(unix("tls", path))


def test_a_server_that_wants_client_certificates_is_alive(tls: dict[str, Any]) -> None:
    """--ssl-cert-reqs=2: it does not answer without one, and its handshake tells that it is up."""
    with serving(**tls, ssl_cert_reqs=2) as port:
        assert not answers(f"https://127.0.0.1:{port}/health")
        assert answers(f"tls://127.0.0.1:{port}/health")
    assert not answers(f"tls://127.0.0.1:{port}/health")


@pytest.mark.parametrize("reqs", [0, 1])
def test_where_client_certificates_are_optional_health_is_asked(
    tls: dict[str, Any], reqs: int
) -> None:
    """And 503, from an engine that died, is not healthy."""
    with serving(**tls, ssl_cert_reqs=reqs) as port:
        assert answers(f"https://127.0.0.1:{port}/health")
    with serving(503, **tls, ssl_cert_reqs=reqs) as port:
        assert not answers(f"https://127.0.0.1:{port}/health")


def test_a_server_without_tls_has_no_handshake() -> None:
    """Whoever listens there is not the engine."""
    with serving() as port:
        assert not answers(f"tls://127.0.0.1:{port}/health")
        assert answers(f"tcp://127.0.0.1:{port}/health")
    assert not answers(f"tcp://127.0.0.1:{port}/health")


def test_a_socket_that_is_bound_and_not_listened_on_is_not_up(tmp_path: Path) -> None:
    """vLLM binds it before it loads, and listens when it serves."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        assert not answers(unix("http", path))


@pytest.mark.parametrize("url", ["", "http://", "https://[::1", "http://h:99999/x", "x+unix://"])
def test_what_is_no_address_is_not_healthy(url: str) -> None:
    """An event log of another version."""
    assert not answers(url)
