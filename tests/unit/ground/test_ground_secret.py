"""What is shown of a URI: never what lets somebody in."""

from __future__ import annotations

import pytest

from tensorserve.secret import redact_text, redact_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://host/a/b", "https://host/a/b"),
        ("https://user:PW@host/a", "https://***@host/a"),
        ("https://user:P@W@host/a", "https://***@host/a"),
        ("https://user:P/W@host/a", "https://***@host/a"),
        ("https://user:1/W@host/a", "https://***@host/a"),
        ("https://host/a@v1", "https://host/a@v1"),
        ("https://host/a?X-Amz-Signature=PW", "https://host/a?***"),
        ("https://host/a#PW", "https://host/a"),
        ("https://host/a#PW?PW", "https://host/a"),
        ("https://user:PW@[::1", "https://***@[::1"),
        ("ftp://user:PW@host/a", "ftp://***@host/a"),
        ("s3://bucket/a@b:c@d", "s3://bucket/a@b:c@d"),
        ("s3://key:PW@bucket/a", "s3://***@bucket/a"),
        ("gs://bucket/a@b:c@d", "gs://bucket/a@b:c@d"),
        ("az://key:PW@container/a", "az://***@container/a"),
        ("hf://org/model@v1/a:b@c", "hf://org/model@v1/a:b@c"),
        ("/models/a@b?c", "/models/a@b?c"),
        ("file:///models/a@b?c", "file:///models/a@b?c"),
        ("file://user:PW@host/a@b", "file://***@host/a@b"),
    ],
)
def test_a_uri_is_shown_without_its_credentials(uri: str, shown: str) -> None:
    """User info, signatures and fragments; a password may hold any character."""
    assert redact_uri(uri) == shown


def test_a_text_is_shown_without_the_credentials_of_its_urls() -> None:
    """botocore and others print the endpoint."""
    text = 'Could not connect to the endpoint URL: "https://user:P/W@host/b", nor a@b'
    assert redact_text(text) == (
        'Could not connect to the endpoint URL: "https://***@host/b", nor a@b'
    )
