"""/readyz of an engine on a Unix socket. One that wants client certificates: test_drafts.py."""

from __future__ import annotations

import http.client
import os
import socket
from pathlib import Path

import pytest
import tiny_models
import torch
from running import Tensorserve

from tensorserve.cli import main as tensorserve


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A tiny model, plain."""
    base = tmp_path_factory.mktemp("bundle")
    model = tiny_models.llama(base / "model", model_dir, torch.bfloat16, tied=False)
    assert tensorserve(["pack", str(model), str(base / "packed")]) == 0
    return base / "packed"


def health(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    return status


def test_an_engine_on_a_unix_socket_becomes_ready(tmp_path: Path, bundle: Path) -> None:
    """Also with what a Windows editor, Compose and `docker --env-file` leave in the settings."""
    # A path of pytest's is too long for a socket.
    path = Path(f"/tmp/tensorserve-test-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # as vLLM leaves it when it ends
    settings = {
        "TENSORSERVE_MODEL_URI": f'"{bundle}"\r\n',
        "TENSORSERVE_VLLM_UDS": f"{path}\n",
        "TENSORSERVE_VLLM_DTYPE": " bfloat16\r\n",
        "TENSORSERVE_PASSPHRASE": "",
        "TENSORSERVE_HOST": "",
        "AWS_PROFILE": "",
    }
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        assert health(connection) == 200
        assert engine.get("/health")[0] == 0
        assert engine.metric("tensorserve_ready") == 1
    path.unlink(missing_ok=True)
