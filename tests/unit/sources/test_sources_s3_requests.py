"""A read is the request that a botocore client would send: address, region, signed headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.loaders import create_loader

from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.sources import S3Access
from tensorserve.sources.s3_client import S3Account
from tensorserve.sources.s3_uri import split_s3

_IS_SETTING = re.compile(r"AWS_|.*_proxy$|REQUESTS_CA|SSL_CERT_FILE", re.IGNORECASE)
KEYS = {"access_key_id": Secret("id"), "secret_access_key": Secret("secret")}
POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint/point"


@pytest.fixture(autouse=True)
def no_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test sets is found."""
    import os

    for name in [n for n in os.environ if _IS_SETTING.match(n)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


_DESCRIPTIONS = create_loader()


class Boto3:
    """A client that sends nothing: it shows what it would send."""

    def __init__(self, region: str) -> None:
        # boto3's default session would remember the first test's settings. Its description of S3
        # (a megabyte of JSON) is the same for all.
        session = botocore.session.get_session()
        session.register_component("data_loader", _DESCRIPTIONS)
        self._client = boto3.session.Session(botocore_session=session).client(
            "s3",
            region_name=region,
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            config=Config(response_checksum_validation="when_required"),
        )
        self._client.meta.events.register("before-send.s3.GetObject", self._hold)
        self._held: list[Any] = []

    def request(self, bucket: str, key: str) -> Any:
        """What it would send, with all its headers."""
        self._client.get_object(Bucket=bucket, Key=key, Range="bytes=0-1", IfMatch='"1"')
        return self._held.pop()

    def _hold(self, request: Any, **_: Any) -> AWSResponse:
        self._held.append(request)

        class Nothing:
            def stream(self) -> Any:
                return iter(())

        return AWSResponse(request.url, 200, {}, Nothing())


def signed_part(authorization: str) -> str:
    """Scope and signed headers, without the moment and the signature."""
    return re.sub(r"/\d{8}/|, Signature=.*", "/", authorization)


def compare(*objects: tuple[str, str], region: str = "us-west-2") -> list[str]:
    """Ours against boto3's, for (bucket, key) of `objects`; gives the URLs."""
    boto, account = Boto3(region), S3Account(S3Access(region=region, **KEYS))
    urls = []
    for bucket, key in objects:
        theirs, request = boto.request(bucket, key), account.object_request(bucket, key)
        ours = request.signed(request.url, {"Range": "bytes=0-1", "If-Match": '"1"'})
        assert request.url == theirs.url
        sent = {n: v.decode() if isinstance(v, bytes) else v for n, v in theirs.headers.items()}
        assert signed_part(ours["Authorization"]) == signed_part(sent["Authorization"])
        names = {n.lower() for n in sent if not n.lower().startswith("amz-sdk-")}
        assert {n.lower() for n in ours} == names
        urls.append(request.url)
    return urls


CONFIGURATIONS = {
    "nothing": ({}, ""),
    "endpoint": ({"AWS_ENDPOINT_URL_S3": "https://store.example:9000"}, ""),
    "endpoint with a path": ({"AWS_ENDPOINT_URL": "http://store.example/base/"}, ""),
    "both endpoints": (
        {"AWS_ENDPOINT_URL_S3": "https://s3.example", "AWS_ENDPOINT_URL": "https://all.example"},
        "",
    ),
    "profile's endpoint": ({}, "endpoint_url = https://profile.example"),
    "services section": (
        {},
        "services = own\n[services own]\ns3 =\n  endpoint_url = https://services.example",
    ),
    "ignored endpoint": (
        {
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
            "AWS_ENDPOINT_URL_S3": "https://no.example",
        },
        "",
    ),
    "virtual": (
        {"AWS_ENDPOINT_URL_S3": "https://store.example"},
        "s3 =\n  addressing_style = virtual",
    ),
    "path": ({}, "s3 =\n  addressing_style = path"),
    "dual stack": ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, ""),
    "dual stack of a profile": ({}, "s3 =\n  use_dualstack_endpoint = true"),
    "fips": ({"AWS_USE_FIPS_ENDPOINT": "true"}, ""),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations_are_read_as_boto3_reads_them(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Environment, profile, services section."""
    variables, text = CONFIGURATIONS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config").write_text(f"[default]\n{text}\n")
    compare(("bucket", "m/model.tensors"), ("dotted.bucket", "m/model.tensors"))


def test_an_accelerated_bucket_is_asked_as_boto3_asks(tmp_path: Path) -> None:
    """Not one with dots, which botocore refuses."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  use_accelerate_endpoint = true\n")
    assert compare(("bucket", "k"))[0] == "https://bucket.s3-accelerate.amazonaws.com/k"


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1", "x"])
def test_regions_have_the_addresses_that_boto3_gives_them(region: str) -> None:
    """Partitions and the global endpoint included."""
    compare(("bucket", "k"), region=region)


KEYS_OF_OBJECTS = (
    *("a b", "a+b", "a%20b", "ümlaut", "/leading", "a//b", "a/../b", "a/./b", "?#&=", "~!*'()"),
)


def test_keys_are_encoded_as_boto3_encodes_them() -> None:
    """In path and in signature."""
    compare(*[("bucket", key) for key in KEYS_OF_OBJECTS])


def test_an_access_point_is_a_bucket() -> None:
    """As `aws s3` takes them: s3://arn:…:accesspoint/name/key."""
    bucket, key = split_s3(f"s3://{POINT}/m/k")
    assert (bucket, key) == (POINT, "m/k")
    assert compare((bucket, key))[0].startswith(
        "https://point-123456789012.s3-accesspoint.us-west-2."
    )


@pytest.mark.parametrize(
    ("bucket", "said"),
    [
        ("arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap", "multi-region"),
        ("arn:aws:s3:us-west-2:123456789012:accesspoint/-", "(?i)invalid"),
    ],
)
def test_what_boto3_cannot_reach_is_a_configuration_error(bucket: str, said: str) -> None:
    """Exit code 78, and no traceback."""
    with pytest.raises(ConfigurationError, match=said):
        S3Account(S3Access(region="us-west-2", **KEYS)).object_request(bucket, "k")


def test_a_style_of_ours_wins_over_the_configuration(tmp_path: Path) -> None:
    """TENSORSERVE_S3_ADDRESSING_STYLE."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = path\n")
    access = S3Access(endpoint_url="https://h:1", region="x", addressing_style="virtual", **KEYS)
    assert S3Account(access).object_request("bucket", "k").url == "https://bucket.h:1/k"


def test_an_unsigned_request_has_nothing_of_a_signature() -> None:
    """TENSORSERVE_S3_UNSIGNED, and no credentials are looked for."""
    request = S3Account(S3Access(region="x", unsigned=True)).object_request("bucket", "k")
    headers = request.signed(request.url, {"Range": "bytes=0-1"})
    assert set(headers) == {"Range", "User-Agent"}


def test_who_pays_is_signed() -> None:
    """TENSORSERVE_S3_REQUEST_PAYER."""
    access = S3Access(region="us-west-2", request_payer="requester", **KEYS)
    request = S3Account(access).object_request("bucket", "k")
    headers = request.signed(request.url, {})
    assert headers["x-amz-request-payer"] == "requester"
    assert "x-amz-request-payer" in headers["Authorization"]


def test_a_session_token_is_signed_too() -> None:
    """Temporary credentials."""
    access = S3Access(region="eu-central-1", session_token=Secret("token"), **KEYS)
    request = S3Account(access).object_request("bucket", "k")
    headers = request.signed(request.url, {"Range": "bytes=0-1"})
    assert headers["X-Amz-Security-Token"] == "token"
    assert "x-amz-security-token" in headers["Authorization"]
    assert "/eu-central-1/s3/" in headers["Authorization"]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("AWS_USE_FIPS_ENDPOINT", "true", "FIPS"), ("AWS_PROFILE", "none", "none")],
)
def test_settings_that_boto3_refuses_are_configuration_errors(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 78."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  use_accelerate_endpoint = true\n")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=said):
        S3Account(S3Access(region="us-west-2", **KEYS)).object_request("bucket", "k")
