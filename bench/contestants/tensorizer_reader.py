"""tensorizer's own TensorDeserializer, from a file, over HTTP or from S3."""

from __future__ import annotations

import os
from pathlib import Path

from bench.contestants import Job, Loaded, synchronize


def prepare(job: Job) -> None:
    """Import everything that a load needs."""
    import tensorizer  # noqa: F401

    if job.uri.startswith("s3://"):
        import boto3  # noqa: F401


def load(job: Job) -> Loaded:
    """All tensors on the device (option `device`); option `readers` is its num_readers."""
    from tensorizer import DecryptionParams, TensorDeserializer

    encryption = None
    if job.key_file:
        encryption = DecryptionParams.from_key(Path(job.key_file).read_bytes())
    device = job.options.get("device", "cpu")
    deserializer = TensorDeserializer(
        _stream(job.uri),
        device=device,
        num_readers=job.options.get("readers"),
        encryption=encryption,
    )
    tensors = dict(deserializer.items())
    synchronize(device)
    return Loaded(tensors, deserializer.close)


def _stream(uri: str) -> object:
    """A path as it is: tensorizer uses eight readers for files and two for streams by default."""
    if "://" not in uri:
        return uri
    from tensorizer import stream_io

    if not uri.startswith("s3://"):
        return stream_io.open_stream(uri, "rb")
    return stream_io.open_stream(
        uri,
        "rb",
        s3_access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        s3_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        s3_endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        s3_region_name=os.environ["AWS_REGION"],
        force_http=os.environ["AWS_ENDPOINT_URL_S3"].startswith("http://"),
    )
