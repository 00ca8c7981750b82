"""safetensors' load_file on a local file; from S3 after a download to disk with boto3."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from bench.contestants import Job, Loaded
from bench.directories import CACHE

_PAGE = 4096


def prepare(job: Job) -> None:
    """Import everything that a load needs."""
    import safetensors.torch  # noqa: F401

    if job.uri.startswith("s3://"):
        import boto3  # noqa: F401


def load(job: Job) -> Loaded:
    """All tensors, in memory; `parts` says how long the download took."""
    if not job.uri.startswith("s3://"):
        return _load_file(Path(job.uri))
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="download-") as directory:
        file = Path(directory) / "model.safetensors"
        started = time.perf_counter()
        _download(job.uri, file)
        downloaded = time.perf_counter() - started
        loaded = _load_file(file)
    return Loaded(loaded.tensors, loaded.close, {"download": downloaded} | loaded.parts)


def _load_file(file: Path) -> Loaded:
    import torch
    from safetensors.torch import load_file

    started = time.perf_counter()
    tensors = load_file(file)
    # It maps the file and reads nothing; the others have their bytes in memory when they are done.
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8)[::_PAGE].max()
    return Loaded(tensors, parts={"read": time.perf_counter() - started})


def _download(uri: str, file: Path) -> None:
    import boto3

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])
    client.download_file(bucket, key, str(file))
