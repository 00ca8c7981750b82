"""compose.yaml's OpenBao: what its container does, with the real program on 127.0.0.1."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import pytest
import vault
from openbao import PROGRAM, OpenBao, configuration
from s3server import free_ports


@contextmanager
def started(data: Path, shared: Path) -> Iterator[str]:
    """As `vault.serve` does it, but on 127.0.0.1, and the server is not this process."""
    port, cluster_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    config = data / "bao.hcl"
    config.write_text(
        configuration(
            f"http://{address}", address, directory=data / "storage", cluster_port=cluster_port
        )
    )
    with (data / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "server", "-config", str(config)], stdout=log,
                                   stderr=subprocess.STDOUT, env={"HOME": str(data)})  # fmt: skip
    try:
        vault.set_up(f"http://{address}", data / "owner.json", shared)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def test_a_restart_unseals_and_the_tokens_have_one_policy_each(tmp_path: Path) -> None:
    """What was wrapped before is unwrapped after; the server's token only unwraps."""
    data, shared = tmp_path / "vault", tmp_path / "demo"
    for directory in (data, data / "storage", shared):
        directory.mkdir()

    def as_owner_of(url: str, policy: str) -> OpenBao:
        asked = OpenBao(url)
        asked.token = vault.token_file(shared, policy).read_text()
        return asked

    with started(data, shared) as url:
        packer = as_owner_of(url, "packer")
        made = packer.ask("POST", "transit/encrypt/models", {"plaintext": "AAAA"})
        packer.rotate("models")
        with pytest.raises(HTTPError, match="403"):
            packer.ask("GET", "sys/policies/acl/server")
    with started(data, shared) as url:
        server = as_owner_of(url, "server")
        found = server.ask("POST", "transit/decrypt/models", made["data"])
        assert found["data"]["plaintext"] == "AAAA"
        for path in ("transit/encrypt/models", "transit/keys/models/rotate"):
            with pytest.raises(HTTPError, match="403"):
                server.ask("POST", path, {"plaintext": "AAAA"})
    for path in (data / "owner.json", *shared.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600
