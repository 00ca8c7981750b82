"""How do tests reach their S3 server: with boto3, and as our own sources do."""

from __future__ import annotations

from typing import Any

import boto3
from s3server import S3Server

from tensorserve.secret import Secret
from tensorserve.sources import S3Access

REGION = "us-east-1"


def s3_client(server: S3Server, *, key: str | None = None, secret: str | None = None) -> Any:
    """A client of boto3's for `server`; with `key` and `secret`, not as its owner."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=key or server.access_key,
        aws_secret_access_key=secret or server.secret_key,
        region_name=REGION,
    )


def s3_access(server: S3Server, **changes: Any) -> S3Access:
    """The owner's access to `server`, with `changes`."""
    values: dict[str, Any] = {
        "endpoint_url": server.endpoint_url,
        "region": REGION,
        "access_key_id": Secret(server.access_key),
        "secret_access_key": Secret(server.secret_key),
    }
    return S3Access(**(values | changes))
