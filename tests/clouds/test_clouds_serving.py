"""`pack` and `up` as a user runs them, from each cloud, with real vLLM (`make test-clouds`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import BIN, Tensorserve, clean_environment

from azure_blobs import make_container
from cloud_servers import KEY, Hub, azurite, gcs_server
from tensorserve.sources import Access

TOKEN = "hf_canary_of_the_hub"


@dataclass(frozen=True)
class Cloud:
    """Where a bundle is put, and what reaches it."""

    uri: str
    environment: dict[str, str]
    secret: str


@contextmanager
def google() -> Iterator[Cloud]:
    with gcs_server() as server:
        server.make_bucket("models")
        yield Cloud("gs://models/m", {"STORAGE_EMULATOR_HOST": server.url}, "")


@contextmanager
def microsoft() -> Iterator[Cloud]:
    with azurite() as server:
        make_container("models", Access(azure=server.access))
        given = {"AZURE_STORAGE_CONNECTION_STRING": server.connection_string}
        yield Cloud("az://models/m", given, KEY)


@contextmanager
def hub(bundle: Path) -> Iterator[Cloud]:
    """The bundle in a stand-in hub: nothing is written to one."""
    with Hub("org/model", token=TOKEN) as server:
        for file in bundle.iterdir():
            server.put(f"v1/{file.name}", file.read_bytes())
        given = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN}
        yield Cloud("hf://org/model/v1", given, TOKEN)


def pack(model: Path, place: str, key: Path, environ: dict[str, str]) -> None:
    words = [str(BIN / "tensorserve"), "pack", str(model), place, "--encrypt", "--key-file"]
    environment = clean_environment() | environ
    done = subprocess.run([*words, str(key)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def environments_below(process: int) -> list[bytes]:
    """Of a process and of all that descend from it."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal() and os.getsid(int(directory.name)) == process:
            found.append((directory / "environ").read_bytes())
    return found


@pytest.mark.parametrize("name", ["gs", "az", "hf"])
def test_a_model_is_packed_and_served(name: str, model_dir: Path, tmp_path: Path) -> None:
    """It answers, and the store's secret is in no process's environment but the first one's."""
    key = tmp_path / "key"
    key.write_text(bytes(range(32)).hex())
    if name == "hf":
        pack(model_dir, str(tmp_path / "bundle"), key, {})
        opened = hub(tmp_path / "bundle")
    else:
        opened = google() if name == "gs" else microsoft()
    with opened as cloud:
        if name != "hf":
            pack(model_dir, cloud.uri, key, cloud.environment)
        given = {"TENSORSERVE_MODEL_URI": cloud.uri, "TENSORSERVE_KEY_FILE": str(key)}
        engine = Tensorserve(tmp_path, cloud.environment | given)
        with engine:
            engine.wait_ready()
            ((text, _),) = engine.completions("model", ["The capital of France is"])
            assert "Paris" in text
            if cloud.secret:
                assert engine.process is not None
                holding = environments_below(engine.process.pid)
                assert len(holding) > 2
                assert sum(cloud.secret.encode() in each for each in holding) == 1
                assert cloud.secret not in engine.text
