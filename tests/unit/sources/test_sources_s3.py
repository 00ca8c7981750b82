"""S3: signed ranges against a real server, and what its refusals are turned into."""

from __future__ import annotations

import os
from email.utils import formatdate
from pathlib import Path
from typing import Any

import boto3
import pytest
from s3server import S3Server

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import Secret
from tensorserve.sources import (
    Access,
    NotFoundError,
    RetryPolicy,
    S3Access,
    list_names,
    open_source,
)
from tensorserve.sources.s3 import S3Account, explain_code

POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)


@pytest.fixture(scope="module")
def server(s3: S3Server, bucket: str) -> S3Server:
    assert bucket == "models"
    return s3


def access_of(server: S3Server, **changes: Any) -> Access:
    values: dict[str, Any] = {
        "endpoint_url": server.endpoint_url,
        "region": "us-east-1",
        "access_key_id": Secret(server.access_key),
        "secret_access_key": Secret(server.secret_key),
    }
    return Access(s3=S3Access(**(values | changes)), policy=POLICY)


@pytest.fixture(scope="module")
def client(server: S3Server) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )


@pytest.mark.parametrize("key", ["m/model.tensors", "m/with space & plus+.bin", "m/ümlaut"])
def test_an_object_is_read_by_signed_ranges(server: S3Server, client: Any, key: str) -> None:
    """Names that need quoting are signed as they are sent."""
    data = os.urandom(300_000)
    client.put_object(Bucket="models", Key=key, Body=data)
    source = open_source(f"s3://models/{key}", access_of(server))
    assert source.size == len(data)
    assert source.version
    assert source.read(100_001, 150_000) == data[100_001:250_001]


def test_a_prefix_is_listed_with_sizes(server: S3Server, client: Any) -> None:
    """Relative to the prefix, and not beyond it."""
    for name in ("bundle/config.json", "bundle/sub/x", "bundle2/y"):
        client.put_object(Bucket="models", Key=name, Body=b"abc")
    found = list_names("s3://models/bundle", access_of(server))
    assert found == {"config.json": 3, "sub/x": 3}


def test_an_object_replaced_in_the_middle_is_fatal(server: S3Server, client: Any) -> None:
    """F6, with the real server's own If-Match."""
    client.put_object(Bucket="models", Key="replaced", Body=bytes(200_000))
    source = open_source("s3://models/replaced", access_of(server))
    client.put_object(Bucket="models", Key="replaced", Body=os.urandom(200_000))
    with pytest.raises(CorruptError, match="replaced"):
        source.read(100_000, 50_000)


def test_a_missing_object_is_not_found(server: S3Server) -> None:
    """Exit code 65."""
    with pytest.raises(NotFoundError, match="s3://models/nothing"):
        open_source("s3://models/nothing", access_of(server))


def test_a_missing_bucket_is_unavailable(server: S3Server) -> None:
    """Exit code 69, with the bucket's name."""
    with pytest.raises(SourceUnavailableError, match="'no-such-bucket'"):
        open_source("s3://no-such-bucket/m", access_of(server))


@pytest.mark.parametrize("wrong", ["access_key_id", "secret_access_key"])
def test_wrong_credentials_are_a_matter_of_permission(server: S3Server, wrong: str) -> None:
    """Exit code 77, not retried, and nothing of them in the message."""
    access = access_of(server, **{wrong: Secret("canary-wrong")})
    with pytest.raises(PermissionDeniedError) as caught:
        open_source("s3://models/m/model.tensors", access)
    assert caught.value.exit_code == 77
    assert "canary" not in str(caught.value)


def test_no_credentials_name_the_variables(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The chain is asked and finds nothing."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    access = access_of(server, access_key_id=None, secret_access_key=None, region="eu-west-1")
    with pytest.raises(PermissionDeniedError, match="AWS_ACCESS_KEY_ID"):
        open_source("s3://models/m/model.tensors", access)
    (tmp_path / "none").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root every file is readable
    with pytest.raises(PermissionDeniedError, match="none cannot be read by this user"):
        open_source("s3://models/m/model.tensors", access)


def test_credentials_of_a_profile_work(
    server: S3Server, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """botocore's chain: a shared credentials file."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text(
        f"[serving]\naws_access_key_id={server.access_key}\n"
        f"aws_secret_access_key={server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "serving")
    client.put_object(Bucket="models", Key="profile", Body=b"x")
    access = access_of(server, access_key_id=None, secret_access_key=None, region="eu-west-2")
    assert open_source("s3://models/profile", access).read(0, 1) == b"x"


def test_a_session_token_is_signed_too() -> None:
    """Temporary credentials."""
    account = S3Account(
        S3Access(
            region="eu-central-1",
            access_key_id=Secret("id"),
            secret_access_key=Secret("secret"),
            session_token=Secret("token"),
        )
    )
    headers = account.signed(account.url("b", "k"), {"Range": "bytes=0-1"})
    assert headers["X-Amz-Security-Token"] == "token"
    assert "x-amz-security-token" in headers["Authorization"]
    assert "/eu-central-1/s3/" in headers["Authorization"]


@pytest.mark.parametrize(
    ("access", "bucket", "url"),
    [
        (S3Access(region="eu-west-1"), "b", "https://b.s3.eu-west-1.amazonaws.com/k%20k"),
        (S3Access(region="eu-west-1"), "b.c", "https://s3.eu-west-1.amazonaws.com/b.c/k%20k"),
        (S3Access(region="x", endpoint_url="http://h:1/"), "b", "http://h:1/b/k%20k"),
        (
            S3Access(region="x", endpoint_url="http://h:1", addressing_style="virtual"),
            "b",
            "http://b.h:1/k%20k",
        ),
    ],
)
def test_the_url_follows_the_addressing_style(access: S3Access, bucket: str, url: str) -> None:
    """Host names at AWS; paths elsewhere, and for buckets with dots (their certificate fails)."""
    keyed = S3Access(
        **{**access.__dict__, "access_key_id": Secret("i"), "secret_access_key": Secret("s")}
    )
    assert S3Account(keyed).url(bucket, "k k") == url


@pytest.mark.parametrize(
    ("code", "status", "kind", "said"),
    [
        ("PermanentRedirect", 301, ConfigurationError, "AWS_REGION=eu-west-3"),
        ("AuthorizationHeaderMalformed", 400, ConfigurationError, "AWS_REGION=eu-west-3"),
        ("RequestTimeTooSkewed", 403, PermissionDeniedError, "ahead"),
        ("ExpiredToken", 400, PermissionDeniedError, "expired"),
        ("AccessDenied", 403, PermissionDeniedError, "s3:GetObject"),
    ],
)
def test_refusals_are_said_as_what_they_are(
    code: str, status: int, kind: type[Exception], said: str
) -> None:
    """F5, F15: with the right region, or by how much the clocks differ."""
    headers = {"x-amz-bucket-region": "eu-west-3", "Date": formatdate(1_000_000, usegmt=True)}
    error = explain_code(code, status, headers, name="s3://b/k", bucket="b", region="us-east-1")
    assert isinstance(error, kind)
    assert said in str(error)
