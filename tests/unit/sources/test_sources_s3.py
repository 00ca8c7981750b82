"""S3: signed ranges against a real server, and what its refusals are turned into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from s3server import S3Server

from faultserver import FaultServer, Reply
from fronts import Front, Seen
from s3_clients import s3_access, s3_client
from tensorserve.errors import (
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import Secret
from tensorserve.sources import (
    Access,
    NotFoundError,
    RetryPolicy,
    list_names,
    open_source,
)

POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)


@pytest.fixture(scope="module")
def server(s3: S3Server, bucket: str) -> S3Server:
    assert bucket == "models"
    return s3


def access_of(server: S3Server, **changes: Any) -> Access:
    return Access(s3=s3_access(server, **changes), policy=POLICY)


@pytest.fixture(scope="module")
def client(server: S3Server) -> Any:
    return s3_client(server)


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


def test_a_bucket_of_another_region_is_found(server: S3Server, client: Any) -> None:
    """As boto3 finds it: refused once, asked again with the region that the refusal names."""
    client.put_object(Bucket="models", Key="elsewhere", Body=b"abc")
    region = "</Message><Region>eu-west-3</Region><Message>"

    def refuse(seen: Seen) -> tuple[int, str, str] | None:
        wrong = "/us-east-1/s3/" in seen.headers["Authorization"]
        return (400, "AuthorizationHeaderMalformed", region) if wrong else None

    with Front(server.port, refuse=refuse) as front:
        access = access_of(server, endpoint_url=front.url)
        assert open_source("s3://models/elsewhere", access).read(0, 3) == b"abc"
        assert list_names("s3://models/elsewhere", access) == {}


@pytest.mark.parametrize("length", [2, 4])
def test_what_a_front_has_compressed_is_refused(server: S3Server, length: int) -> None:
    """Its length is not the range's; a mere name for the object's own bytes is passed over."""
    body, header = b"x" * length, {"Content-Encoding": "gzip", "Content-Range": "bytes 0-2/3"}
    with FaultServer(lambda _: Reply(206, header, body)) as front:
        access = access_of(server, endpoint_url=front.url)
        with pytest.raises(SourceUnavailableError, match="gzip"):
            open_source("s3://models/packed", access)
