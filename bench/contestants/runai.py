"""Run:ai Model Streamer on plain safetensors, from a file or from S3."""

from __future__ import annotations

import os
import sys

from bench.contestants import Job, Loaded
from bench.packages import bench_packages


def prepare(job: Job) -> None:
    """Sets the environment variables that the package reads at import, and imports it."""
    concurrency = job.options.get("concurrency")
    if concurrency:
        # The first is for all, the second for object stores.
        os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(concurrency)
        if job.uri.startswith("s3://"):
            os.environ["RUNAI_STREAMER_OBJ_CONCURRENCY"] = str(concurrency)
    os.environ["RUNAI_STREAMER_LOG_LEVEL"] = "WARNING"
    # It knows no AWS_ENDPOINT_URL_S3, and by default wants the bucket in the host's name.
    if "AWS_ENDPOINT_URL_S3" in os.environ:
        os.environ["AWS_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]
        os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
        os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    # At the end: torch and numpy are the environment's.
    sys.path.append(str(bench_packages()))
    import runai_model_streamer

    if job.uri.startswith("s3://"):
        import runai_model_streamer_s3  # noqa: F401
    assert runai_model_streamer


def load(job: Job) -> Loaded:
    """All tensors. By default each belongs to the caller: none is copied here."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(job.uri)
        tensors = dict(streamer.get_tensors())
    return Loaded(tensors)
