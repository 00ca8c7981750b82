"""S3's refusals are said as what they are, to whoever reads, lists or writes."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import formatdate

import pytest
from botocore.exceptions import ClientError

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources.base import ForbiddenError, NotFoundError, ReplacedError
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.s3 import s3_error
from tensorserve.sources.s3_errors import (
    LIST,
    READ,
    WRITE,
    Asked,
    OtherRegionError,
    Refusal,
    explain,
)

ASKED = Asked("s3://b/k", "b", "us-east-1")
HEADERS = {"x-amz-bucket-region": "eu-west-3", "Date": formatdate(1_000_000, usegmt=True)}
KMS = "User: u is not authorized to perform: kms:Decrypt on the resource"
SSE_C = (
    "The object was stored using a form of Server Side Encryption. The correct parameters must be "
    "provided to retrieve the object."
)
# (status, elements of the document, error, what is said)
CASES = [
    (403, {"Code": "InvalidObjectState", "StorageClass": "DEEP_ARCHIVE"}, SourceUnavailableError,
     "(?s)storage class DEEP_ARCHIVE.*Restore it first"),
    (403, {"Code": "InvalidObjectState"}, SourceUnavailableError, "Glacier.*restored"),
    (403, {"Code": "AccessDenied", "Message": KMS}, PermissionDeniedError, "need kms:Decrypt"),
    (400, {"Code": "KMS.DisabledException", "Message": "the key is disabled"},
     PermissionDeniedError, "(?s)the key is disabled.*enabled"),
    (400, {"Code": "InvalidRequest", "Message": SSE_C}, ConfigurationError, "SSE-C.*not supported"),
    (400, {"Code": "InvalidArgument", "Message": "x-amz-server-side-encryption-customer-key"},
     ConfigurationError, "SSE-C"),
    (403, {"Code": "AccessDenied", "Message": "Requester Pays bucket"}, PermissionDeniedError,
     "TENSORSERVE_S3_REQUEST_PAYER=requester"),
    (403, {"Code": "PathStyleRequestNotAllowed"}, ConfigurationError,
     "TENSORSERVE_S3_ADDRESSING_STYLE=virtual"),
    (403, {"Code": "SecondLevelDomainForbidden", "Message": "Please use virtual hosted style"},
     ConfigurationError, "TENSORSERVE_S3_ADDRESSING_STYLE=virtual"),
    (404, {"Code": "NoSuchKey"}, NotFoundError, "does not exist"),
    (404, {"Code": "NoSuchBucket"}, SourceUnavailableError, "bucket 'b' does not exist"),
    (400, {"Code": "InvalidBucketName"}, ConfigurationError, "not a valid bucket name"),
    (403, {"Code": "AllAccessDisabled", "Message": "closed"}, PermissionDeniedError,
     "all access is disabled.*closed"),
    (301, {"Code": "PermanentRedirect"}, OtherRegionError, "AWS_REGION=eu-west-3"),
    (400, {"Code": "AuthorizationHeaderMalformed"}, OtherRegionError, "AWS_REGION=eu-west-3"),
    (403, {"Code": "RequestTimeTooSkewed"}, PermissionDeniedError, "ahead"),
    (400, {"Code": "ExpiredToken"}, PermissionDeniedError, "token expired"),
    (400, {"Code": "RequestExpired"}, PermissionDeniedError, "signature expired"),
    (403, {"Code": "InvalidAccessKeyId"}, PermissionDeniedError, "does not know these"),
    (405, {"Code": "MethodNotAllowed"}, SourceUnavailableError, "405"),
    (412, {"Code": "PreconditionFailed"}, ReplacedError, "was replaced"),
    (400, {"Code": "KeyTooLongError"}, ConfigurationError, "longer than"),
    (501, {"Code": "NotImplemented", "Message": "A header you provided"}, SourceUnavailableError,
     "A header you provided"),
    (400, {"Code": "SlowDown"}, TryAgain, "SlowDown"),
    (400, {"Code": "RequestTimeout"}, TryAgain, "timed out waiting"),
    (418, {"Code": "Odd", "Message": "an odd thing"}, SourceUnavailableError, "Odd: an odd thing"),
    (403, {"Code": "AccessDenied", "Message": "no identity-based policy allows it"},
     ForbiddenError, "no identity-based policy"),
    (403, {"Code": "AccessDenied", "Message": "Access Denied"}, ForbiddenError,
     "s3:GetObject"),
]  # fmt: skip


def document(details: Mapping[str, str]) -> bytes:
    """An error document."""
    inner = "".join(f"<{name}>{text}</{name}>" for name, text in details.items())
    return f'<?xml version="1.0"?>\n<Error>{inner}</Error>'.encode()


def client_error(status: int, details: Mapping[str, str]) -> ClientError:
    """As botocore raises it: names of headers in small letters."""
    headers = {name.lower(): text for name, text in HEADERS.items()}
    answer = {
        "Error": dict(details),
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return ClientError(answer, "ListObjectsV2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "details", "kind", "said"), CASES)
def test_a_reader_is_told_what_it_is(
    status: int, details: Mapping[str, str], kind: type[Exception], said: str
) -> None:
    """From the error document of an answer."""
    error = explain(Refusal.of_answer(status, HEADERS, document(details)), ASKED)
    assert type(error) is kind
    with pytest.raises(kind, match=said):
        raise error


@pytest.mark.parametrize(("status", "details", "kind", "said"), CASES)
def test_who_lists_is_told_the_same(
    status: int, details: Mapping[str, str], kind: type[Exception], said: str
) -> None:
    """From botocore's ClientError."""
    error = s3_error(client_error(status, details), ASKED)
    assert type(error) is kind
    with pytest.raises(kind, match=said):
        raise error


@pytest.mark.parametrize(
    ("status", "headers", "kind", "said"),
    [
        (405, {"x-amz-delete-marker": "true"}, NotFoundError, "delete marker"),
        (404, {"x-amz-delete-marker": "true"}, NotFoundError, "delete marker"),
        (404, {}, NotFoundError, "does not exist"),
        (403, {}, PermissionDeniedError, "no reason given"),
        (403, {"x-minio-error-code": "InvalidObjectState"}, SourceUnavailableError, "Restore"),
        (407, {}, PermissionDeniedError, "proxy asks for a user"),
    ],
)
def test_an_answer_without_a_document_is_explained_too(
    status: int, headers: Mapping[str, str], kind: type[Exception], said: str
) -> None:
    """HEAD, and fronts that take the document away."""
    error = explain(Refusal.of_answer(status, headers, b""), ASKED)
    assert error is not None
    with pytest.raises(kind, match=said):
        raise error


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_left_to_the_status(status: int) -> None:
    """Retry-After is in its headers."""
    refusal = Refusal.of_answer(status, {}, document({"Code": "SlowDown"}))
    assert explain(refusal, ASKED) is None
    assert isinstance(s3_error(client_error(status, {"Code": "SlowDown"}), ASKED), TryAgain)


@pytest.mark.parametrize(
    ("action", "needed"),
    [(READ, "s3:GetObject"), (LIST, "s3:ListBucket"), (WRITE, "s3:PutObject")],
)
def test_a_denied_request_names_what_it_needs(action: str, needed: str) -> None:
    """Reading, listing and writing take other permissions."""
    refusal = Refusal.of_answer(403, {}, document({"Code": "AccessDenied"}))
    error = explain(refusal, Asked("s3://b/k", "b", "us-east-1", action))
    assert f"The credentials need {needed}" in str(error)


def test_a_writer_needs_more_of_a_kms_key() -> None:
    """A part is sealed with a new key, and opened when it is put together."""
    refusal = Refusal.of_answer(403, {}, document({"Code": "AccessDenied", "Message": KMS}))
    error = explain(refusal, Asked("s3://b/k", "b", "us-east-1", WRITE))
    assert "kms:GenerateDataKey and kms:Decrypt" in str(error)


def test_without_credentials_the_setting_is_named() -> None:
    """Not the permissions of credentials that there are not."""
    refusal = Refusal.of_answer(403, {}, document({"Code": "AccessDenied"}))
    error = explain(refusal, Asked("s3://b/k", "b", "us-east-1", unsigned=True))
    assert "unset TENSORSERVE_S3_UNSIGNED" in str(error)


def test_words_of_a_server_cannot_fill_or_steer_a_terminal() -> None:
    """Bounded, on one line, without control characters and user info."""
    text = "no\x1b[2J\n" + "x" * 5000 + " https://u:canary@h/"
    refusal = Refusal.of_answer(418, {}, document({"Code": "Odd", "Message": text[:2000]}))
    said = str(explain(refusal, ASKED))
    assert "\x1b" not in said
    assert "\n" not in said
    assert len(said) < 400
