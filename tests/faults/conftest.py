"""A real S3 server with a packed bundle, and a proxy in front of it that makes trouble."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading import digest
from proxy import FaultProxy
from s3server import S3Server
from safetensors.torch import save_file
from stored import BUCKET, KEY, Stored, tensors

from s3_clients import s3_client
from tensorserve.format import read_index
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access
from tensorserve.sources.local import LocalSource
from waiting import wait_for


@pytest.fixture(autouse=True)
def no_other_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test gives is found, and nobody asks a cloud for more."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """However a load ended, its threads end too."""
    yield
    wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("tensorserve")])


def _store(s3: S3Server, directory: Path, name: str, seed: int) -> Stored:
    source, bundle = directory / "hf", directory / "bundle"
    source.mkdir()
    (source / "config.json").write_text("{}")
    content = tensors(seed)
    save_file(content, source / "model.safetensors", {"format": "pt"})
    pack(source, str(bundle), access=Access(), key=Secret(KEY))
    owner = s3_client(s3)
    for path in bundle.iterdir():
        owner.upload_file(str(path), BUCKET, f"{name}/{path.name}")
    opened = LocalSource(bundle / "model.tensors")
    index = read_index(opened)
    opened.close()
    digests = {tensor_name: digest(tensor) for tensor_name, tensor in content.items()}
    data = (bundle / "model.tensors").read_bytes()
    return Stored(f"{name}/model.tensors", data, digests, index, s3)


@pytest.fixture(scope="session")
def stored(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The bundle that is loaded."""
    assert bucket == BUCKET
    return _store(s3, tmp_path_factory.mktemp("stored"), "faults", 1)


@pytest.fixture(scope="session")
def other(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The same names, shapes and key, and other values: what an update of it looks like."""
    assert bucket == BUCKET
    return _store(s3, tmp_path_factory.mktemp("other"), "faults-other", 2)


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """In front of the S3 server."""
    with FaultProxy(s3.endpoint_url) as running:
        yield running
