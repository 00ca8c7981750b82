"""Credentials that run out in the middle (F5): renewed once for all ranges, or said as such."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from s3server import S3Server

from faultserver import Asked, FaultServer, Reply
from rangeserver import RangeServer
from s3_clients import s3_client
from tensorserve.errors import ConfigurationError, PermissionDeniedError, SourceUnavailableError
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy, S3Access, Source, open_source

POLICY = RetryPolicy(attempts=3, deadline=5, connect_timeout=1, stall_timeout=2, backoff_base=0.01)
SIZE = 400_000
EXPIRED = Reply(
    400, {}, b"<Error><Code>ExpiredToken</Code><Message>canary</Message></Error>", label="expired"
)


@pytest.fixture(autouse=True)
def no_other_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test sets is found."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[RangeServer]:
    """The bucket "b" with one object; it asks for no signature."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m").write_bytes(os.urandom(SIZE))
    with RangeServer(tmp_path) as running:
        yield running


def renewing_profile(directory: Path, fails_after: int = 1000) -> Path:
    """A credential_process that gives the session token t1, then t2, ...; returns its counter."""
    counter = directory / "calls"
    script = directory / "credentials.py"
    script.write_text(
        "import json, pathlib, sys\n"
        f"p = pathlib.Path({str(counter)!r})\n"
        "n = (int(p.read_text()) if p.exists() else 0) + 1\n"
        "p.write_text(str(n))\n"
        f"if n > {fails_after}: sys.exit('no more')\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': 'id', 'SecretAccessKey': 'secret',\n"
        "    'SessionToken': f't{n}', 'Expiration': '2099-01-01T00:00:00Z'}))\n"
    )
    (directory / "config").write_text(
        f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} -I {script}\n"
    )
    return counter


def read_in_parallel(source: Source, count: int) -> tuple[dict[int, bytes], list[Exception]]:
    """`count` ranges at once, beyond the head."""
    found: dict[int, bytes] = {}
    failures: list[Exception] = []

    def read(offset: int) -> None:
        try:
            found[offset] = source.read(offset, 10_000)
        except Exception as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    threads = [threading.Thread(target=read, args=(100_000 + 20_000 * n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found, failures


def test_many_ranges_that_expire_together_renew_once(upstream: RangeServer, tmp_path: Path) -> None:
    """All connections are refused in the same moment: none of them may end the start."""
    count = 6
    counter = renewing_profile(tmp_path)
    together = threading.Barrier(count)

    def answer(asked: Asked) -> Reply | None:
        if asked.number == 0 or asked.headers["X-Amz-Security-Token"] != "t1":
            return None
        together.wait(10)
        return EXPIRED

    with FaultServer(answer, upstream=upstream.url) as server:
        access = Access(s3=S3Access(endpoint_url=server.url), policy=POLICY)
        source = open_source("s3://b/m", access)
        found, failures = read_in_parallel(source, count)
    assert not failures
    data = (tmp_path / "b" / "m").read_bytes()
    assert found == {n: data[n : n + 10_000] for n in found}
    assert len(found) == count
    assert server.fired["expired"] == count
    assert counter.read_text() == "2"


def test_a_refusal_of_renewed_credentials_is_final(upstream: RangeServer, tmp_path: Path) -> None:
    """Exit code 77 after one renewal, and nothing of the token."""
    counter = renewing_profile(tmp_path)
    with FaultServer(lambda a: EXPIRED if a.number else None, upstream=upstream.url) as server:
        access = Access(s3=S3Access(endpoint_url=server.url), policy=POLICY)
        source = open_source("s3://b/m", access)
        with pytest.raises(PermissionDeniedError, match="expired") as caught:
            source.read(100_000, 10)
    assert server.fired["expired"] == 2
    assert counter.read_text() == "2"
    assert "canary" not in str(caught.value)


def test_a_renewal_that_fails_is_a_matter_of_permission(
    upstream: RangeServer, tmp_path: Path
) -> None:
    """The provider has no more to give: one of our errors, not botocore's."""
    renewing_profile(tmp_path, fails_after=1)
    with FaultServer(lambda a: EXPIRED if a.number else None, upstream=upstream.url) as server:
        access = Access(s3=S3Access(endpoint_url=server.url), policy=POLICY)
        source = open_source("s3://b/m", access)
        with pytest.raises(PermissionDeniedError, match="renewed"):
            source.read(100_000, 10)
    assert server.fired["expired"] == 1


def test_a_role_that_may_not_be_taken_is_a_matter_of_permission(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """STS refuses: exit code 77, with its reason."""
    (tmp_path / "config").write_text(
        "[default]\nregion = us-east-1\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\n"
    )
    (tmp_path / "credentials").write_text(
        "[base]\naws_access_key_id = id\naws_secret_access_key = canary\n"
    )
    refusal = Reply(
        403,
        {"Content-Type": "text/xml"},
        b"<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>"
        b"<Message>not you</Message></Error></ErrorResponse>",
    )
    with FaultServer(lambda _: refusal) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        access = Access(s3=S3Access(endpoint_url="http://127.0.0.1:9"), policy=POLICY)
        with pytest.raises(PermissionDeniedError, match="AccessDenied") as caught:
            open_source("s3://b/m", access)
    assert sts.fired["403"] >= 1
    assert "canary" not in str(caught.value)


def test_a_provider_that_is_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At the opening too: exit code 69 when patience ends, not a traceback."""
    (tmp_path / "config").write_text(
        "[default]\nregion = us-east-1\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\n"
    )
    (tmp_path / "credentials").write_text(
        "[base]\naws_access_key_id = id\naws_secret_access_key = canary\n"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    access = Access(s3=S3Access(endpoint_url="http://127.0.0.1:9"), policy=POLICY)
    with pytest.raises(SourceUnavailableError, match="provider cannot be reached") as caught:
        open_source("s3://b/m", access)
    assert "canary" not in str(caught.value)


def test_a_credentials_file_that_was_rotated_is_read_again(
    upstream: RangeServer, tmp_path: Path
) -> None:
    """A sidecar that writes new tokens into the file is common, and says no expiry."""
    text = "[default]\naws_access_key_id = id\naws_secret_access_key = s\naws_session_token = {}\n"
    (tmp_path / "credentials").write_text(text.format("t1"))

    def answer(asked: Asked) -> Reply | None:
        stale = asked.number > 0 and asked.headers["X-Amz-Security-Token"] == "t1"
        return EXPIRED if stale else None

    with FaultServer(answer, upstream=upstream.url) as server:
        access = Access(s3=S3Access(endpoint_url=server.url, region="x"), policy=POLICY)
        source = open_source("s3://b/m", access)
        (tmp_path / "credentials").write_text(text.format("t2"))
        assert len(source.read(100_000, 10)) == 10
    assert server.fired["expired"] == 1


def given(server: FaultServer, key: str = "id", secret: str = "s") -> Access:
    """Static keys."""
    keys = {"access_key_id": Secret(key), "secret_access_key": Secret(secret)}
    return Access(s3=S3Access(endpoint_url=server.url, region="us-east-1", **keys), policy=POLICY)


def test_given_keys_cannot_be_renewed(upstream: RangeServer) -> None:
    """Exit code 77 at once."""
    with FaultServer(lambda a: EXPIRED if a.number else None, upstream=upstream.url) as server:
        source = open_source("s3://b/m", given(server))
        with pytest.raises(PermissionDeniedError, match="expired"):
            source.read(100_000, 10)
    assert server.fired["expired"] == 1


def test_a_signature_goes_to_no_other_host(upstream: RangeServer) -> None:
    """F17: gateways redirect to presigned URLs; there our signature has no business."""
    away = Reply(307, {"Location": f"{upstream.url}/b/m"}, label="away")
    with FaultServer(lambda _: away) as server:
        source = open_source("s3://b/m", given(server))
        assert len(source.read(100_000, 10)) == 10
    assert server.fired["away"] == 2
    assert "Authorization" in server.requests[-1].headers
    for _, headers in upstream.requests:
        assert not {h for h in headers if h.lower().startswith(("authorization", "x-amz"))}


def test_a_redirect_to_another_region_is_said_as_such() -> None:
    """Where asking there, as botocore does, is no help; no request is sent unsigned."""
    moved = Reply(
        301,
        {"Location": "http://169.254.1.1/b/m", "x-amz-bucket-region": "eu-west-3"},
        b"<Error><Code>PermanentRedirect</Code></Error>",
    )
    with (
        FaultServer(lambda _: moved) as server,
        pytest.raises(ConfigurationError, match="AWS_REGION=eu-west-3"),
    ):
        open_source("s3://b/m", given(server))
    scopes = [asked.headers["Authorization"].split("/")[2] for asked in server.requests]
    assert set(scopes) == {"us-east-1", "eu-west-3"}


def test_a_request_that_s3_found_too_slow_is_sent_again(upstream: RangeServer) -> None:
    """RequestTimeout is a 400 that passes."""
    slow = Reply(400, {}, b"<Error><Code>RequestTimeout</Code></Error>", label="slow")
    with FaultServer(lambda a: slow if a.number == 1 else None, upstream=upstream.url) as server:
        source = open_source("s3://b/m", given(server))
        assert len(source.read(100_000, 10)) == 10
    assert server.fired["slow"] == 1


@pytest.mark.parametrize("date", ["", "nonsense"])
def test_a_skewed_clock_is_said_even_without_a_usable_date(date: str) -> None:
    """F15."""
    reply = Reply(403, {}, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
    with (
        FaultServer(lambda _: reply, date=date) as server,
        pytest.raises(PermissionDeniedError, match="clocks differ by too much"),
    ):
        open_source("s3://b/m", given(server))
    assert server.fired["403"] == 1


def test_a_skewed_clock_is_said_with_the_difference() -> None:
    """F15."""
    reply = Reply(403, {}, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
    hour_ago = formatdate(time.time() - 3600, usegmt=True)
    with (
        FaultServer(lambda _: reply, date=hour_ago) as server,
        pytest.raises(PermissionDeniedError, match=r"36\d\d s .this machine is ahead"),
    ):
        open_source("s3://b/m", given(server))
    assert server.fired["403"] == 1


def test_each_attempt_at_a_real_s3_server_is_signed_anew(s3: S3Server, bucket: str) -> None:
    """F2, F4: the faults come from the proxy, the verdict on the signatures from the server."""
    data = os.urandom(SIZE)
    s3_client(s3).put_object(Bucket=bucket, Key="behind-a-proxy", Body=data)
    faults = {
        1: Reply(503, {"Retry-After": "0"}, b"<Error><Code>SlowDown</Code></Error>"),
        2: Reply(200, {}, data),  # not a range: see below
    }
    with FaultServer(lambda a: faults.get(a.number), upstream=s3.endpoint_url) as server:
        access = given(server, s3.access_key, s3.secret_key)
        source = open_source(f"s3://{bucket}/behind-a-proxy", access)
        with pytest.raises(SourceUnavailableError, match="200"):
            source.read(0, SIZE)
        assert source.read(0, SIZE) == data
    assert server.fired == {"503": 1, "200": 1}
