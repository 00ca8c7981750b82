"""What botocore's providers of credentials say in Python's own errors: never a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rangeserver import RangeServer
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy, S3Access, open_source

POLICY = RetryPolicy(attempts=2, deadline=2, backoff_base=0.01)


@pytest.fixture(autouse=True)
def no_other_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test sets is found."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "x"}, "Unsupported host"),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://[::1"}, "Invalid IPv6 URL"),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://a.invalid/x"}, "Unsupported host"),
        ({"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "x y"}, "Unsupported host"),
        (
            {"AWS_ROLE_ARN": "arn", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such/token"},
            "/no/such/token",
        ),
    ],
)
def test_a_provider_that_is_set_wrongly_is_said(
    environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a configuration that is wrong."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # A name of its own, so that no other test's account is taken.
    access = Access(S3Access(endpoint_url=f"http://127.0.0.1:1/{said[:4]}", region="r"), POLICY)
    with pytest.raises(ConfigurationError, match=said):
        open_source("s3://b/m", access)


@pytest.mark.parametrize("bad", ["line\nbreak", "\ufeffmark"])
def test_credentials_that_cannot_be_sent_are_not_shown(tmp_path: Path, bad: str) -> None:
    """From a file or a provider they are not looked at before; Python would show the header."""
    with RangeServer(tmp_path) as server:
        account = S3Access(
            endpoint_url=server.url,
            region="r",
            access_key_id=Secret(f"id{bad}"),
            secret_access_key=Secret("canary"),
        )
        with pytest.raises(ConfigurationError, match="invalid character") as caught:
            open_source("s3://b/m", Access(account, POLICY))
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
