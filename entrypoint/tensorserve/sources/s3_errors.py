"""Which error and hint does a refusal of S3 become, from its code, message and headers?

Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html, and those of
S3-compatible servers. Without a body (HEAD, a proxy), headers and status are used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_text
from tensorserve.sources.base import ForbiddenError, NotFoundError, ReplacedError
from tensorserve.sources.http_body import asks_for_a_password
from tensorserve.sources.retry import TryAgain

_ELEMENT = re.compile(rb"<([A-Za-z]{1,40})>([^<]{0,2000})</\1>")
_MESSAGE_SHOWN = 300  # characters
READ, LIST, WRITE = "read", "list", "write"

_VIRTUAL_ONLY = re.compile(
    r"path.?style|virtual.?host|virtual.?style|SecondLevelDomain|third.?level.?domain", re.I
)
_KMS_ACTION = re.compile(r"kms:[A-Za-z*]+")
_CUSTOMER_KEY = re.compile(
    r"form of Server Side Encryption|server-side-encryption-customer|customer.?provided|SSE-?C\b",
    re.I,
)
_PAYER = re.compile(r"request.?payer|requester.?pays", re.I)


class OtherRegionError(ConfigurationError):
    """The bucket is in another region than the request was sent to."""


@dataclass(frozen=True)
class Refusal:
    """An error response of S3, or of another store that answers in its form."""

    code: str
    """S3's error code; empty if there is none."""
    status: int
    headers: Mapping[str, str]
    details: Mapping[str, str]
    """The elements of the error document, such as Code and Message."""

    @classmethod
    def of_answer(cls, status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
        """From an HTTP response; `body` is S3's error document, or a proxy's page."""
        found = {
            name.decode(): unescape(text.decode("utf-8", "replace"))
            for name, text in reversed(_ELEMENT.findall(body))
        }
        return cls._of(status, headers, found)

    @classmethod
    def of_client_error(cls, error: Any) -> Refusal:
        """From a botocore ClientError."""
        meta = error.response.get("ResponseMetadata", {})
        details = error.response.get("Error", {})
        found = {name: str(text) for name, text in details.items() if isinstance(text, str | int)}
        # Without a document, botocore uses the status or its text as the code.
        if found.get("Code", "").isdecimal():
            found = {}
        return cls._of(meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {}), found)

    @classmethod
    def _of(cls, status: int, headers: Mapping[str, str], found: dict[str, str]) -> Refusal:
        code = found.get("Code", "")
        for name in (
            "x-amz-error-code",
            "x-minio-error-code",
            "x-ms-error-code",
        ):  # for answers without a body
            code = code or headers.get(name, "")
        return cls(code, status, headers, found)

    @property
    def message(self) -> str:
        """S3's message: one line, at most 300 characters, redacted."""
        text = " ".join(self.details.get("Message", "").split())
        shown = "".join(c for c in text if c.isprintable())[:_MESSAGE_SHOWN]
        return redact_text(shown).rstrip(".")

    def header(self, name: str) -> str:
        """A header's value, by its name in the given or lower case; empty without it."""
        return self.headers.get(name) or self.headers.get(name.lower()) or ""


@dataclass(frozen=True)
class Asked:
    """The request that was refused."""

    name: str
    """The URI of the object or prefix, for messages."""
    bucket: str
    region: str
    action: str = READ
    unsigned: bool = False
    """Whether it was sent without credentials."""


def explain(refusal: Refusal, asked: Asked) -> Exception | None:
    """The error for `refusal`, TryAgain for a transient one; None if the HTTP status suffices."""
    if refusal.status == 407:
        return asks_for_a_password(asked.name)
    rule = _rule(refusal)
    if rule is not None:
        return rule(refusal, asked)
    if refusal.header("x-amz-delete-marker") == "true":
        return _deleted(refusal, asked)
    if refusal.status == 404 and not refusal.code:
        return _no_key(refusal, asked)
    if refusal.status == 405:
        return _not_allowed(refusal, asked)
    if refusal.status == 403:
        return _denied(refusal, asked)
    if refusal.code and 400 <= refusal.status < 500 and refusal.status != 429:
        return SourceUnavailableError(
            f"{asked.name}: S3 answers {refusal.status} {refusal.code}{_said(refusal)}."
        )
    return None


def _rule(refusal: Refusal) -> _Rule | None:
    rule = _BY_CODE.get(refusal.code)
    if refusal.code.startswith("KMS."):
        rule = _kms
    if (rule is None or refusal.code in _VAGUE) and refusal.status < 500:
        said = f"{refusal.code} {refusal.details.get('Message', '')}"
        rule = next((by_words for words, by_words in _BY_WORDS if words.search(said)), rule)
    return rule


def _said(refusal: Refusal) -> str:
    return f": {refusal.message}" if refusal.message else ""


def _no_bucket(_: Refusal, asked: Asked) -> Exception:
    return SourceUnavailableError(
        f"The bucket {asked.bucket!r} does not exist.",
        hint="Check the bucket's name, and that AWS_ENDPOINT_URL_S3 is the right server.",
    )


def _bad_name(_: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.bucket!r} is not a valid bucket name for this server.",
        hint="Check the URI: s3://bucket/prefix. A server that accepts buckets only in the host "
        "name needs TENSORSERVE_S3_ADDRESSING_STYLE=virtual.",
    )


def _no_key(_: Refusal, asked: Asked) -> Exception:
    return NotFoundError(f"{asked.name} does not exist.", hint="Check the bucket and the prefix.")


def _deleted(_: Refusal, asked: Asked) -> Exception:
    return NotFoundError(
        f"{asked.name} was deleted: its latest version is a delete marker.",
        hint="Delete the marker, or upload the object again.",
    )


def _not_allowed(refusal: Refusal, asked: Asked) -> Exception:
    if refusal.header("x-amz-delete-marker") == "true":
        return _deleted(refusal, asked)
    return SourceUnavailableError(
        f"{asked.name}: the server does not allow to {asked.action} here (405 MethodNotAllowed).",
        hint="Check that AWS_ENDPOINT_URL_S3 is the S3 endpoint, not the address of a website or "
        "a console.",
    )


def _other_region(refusal: Refusal, asked: Asked) -> Exception | None:
    right = refusal.header("x-amz-bucket-region") or refusal.details.get("Region")
    if refusal.code in {"TemporaryRedirect", "Redirect"} and not right:
        return None
    said = "" if right else _said(refusal)
    return OtherRegionError(
        f"The bucket {asked.bucket!r} is not in region {asked.region}{said}.",
        hint=f"Set AWS_REGION={right}." if right else "Set AWS_REGION to the bucket's region.",
    )


def _skewed(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the clocks differ by {_skew(refusal)}, so that S3 refuses the signature.",
        hint="Set this machine's clock (NTP).",
    )


def _unknown_keys(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: S3 does not know these credentials ({refusal.code}).",
        hint="Check that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are right, and are for this "
        "server.",
    )


def _expired(_: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the session token expired.",
        hint="Get a new token, or use a role whose credentials are renewed.",
    )


def _request_expired(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the request's signature expired before S3 received it ({refusal.code}).",
        hint="Check this machine's clock (NTP), and whether a proxy delays requests.",
    )


def _archived(refusal: Refusal, asked: Asked) -> Exception:
    storage = (
        refusal.details.get("StorageClass")
        or refusal.details.get("AccessTier")
        or refusal.header("x-amz-storage-class")
    )
    place = f"the storage class {storage}" if storage else "an archive (for example Glacier)"
    return SourceUnavailableError(
        f"{asked.name} is in {place} and cannot be read until it is restored ({refusal.code}).",
        hint="Restore it first (`aws s3api restore-object`), or copy the model to a storage class "
        "with immediate access.",
    )


def _kms(refusal: Refusal, asked: Asked) -> Exception:
    found = _KMS_ACTION.search(refusal.message)
    needed = "kms:GenerateDataKey and kms:Decrypt" if asked.action == WRITE else "kms:Decrypt"
    if refusal.code.startswith("KMS."):
        return PermissionDeniedError(
            f"{asked.name}: its KMS key cannot be used ({refusal.code}){_said(refusal)}.",
            hint=f"Check that the key is enabled and in this region. The credentials need {needed} "
            "on it.",
        )
    return PermissionDeniedError(
        f"{asked.name}: access to its KMS key is denied{_said(refusal)}.",
        hint=f"The credentials need {found[0] if found and asked.action != WRITE else needed} on "
        "the key, in the key's policy or their own.",
    )


def _customer_key(refusal: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name} is encrypted with a customer-provided key (SSE-C), which is not supported "
        f"({refusal.code or refusal.status}).",
        hint="Store it with SSE-S3 or SSE-KMS; `tensorserve pack --encrypt` encrypts the weights "
        "before the upload.",
    )


def _requester_pays(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the bucket is a requester-pays bucket{_said(refusal)}.",
        hint="Set TENSORSERVE_S3_REQUEST_PAYER=requester: the account of the credentials then pays "
        "for the traffic.",
    )


def _virtual_only(refusal: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name}: this server requires the bucket in the host name ({refusal.code}).",
        hint="Set TENSORSERVE_S3_ADDRESSING_STYLE=virtual, or `s3 = addressing_style = virtual` in "
        "the AWS configuration.",
    )


def _disabled(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: all access is disabled ({refusal.code}){_said(refusal)}.",
        hint="Ask the bucket's owner: the account or the bucket was closed.",
    )


def _changed(_: Refusal, asked: Asked) -> Exception:
    return ReplacedError(
        f"{asked.name} was replaced while it was {'written' if asked.action == WRITE else 'read'}.",
        hint="Start again; upload models under a new name instead of over an old one.",
    )


def _too_long(_: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name}: the key is longer than S3 allows (1024 bytes).",
        hint="Use a shorter prefix.",
    )


def _not_implemented(refusal: Refusal, asked: Asked) -> Exception:
    return SourceUnavailableError(
        f"{asked.name}: the server does not support the request ({refusal.code}){_said(refusal)}.",
        hint="Check that AWS_ENDPOINT_URL_S3 is an S3 server.",
    )


def _passing(refusal: Refusal, _: Asked) -> Exception | None:
    if refusal.status == 429 or refusal.status >= 500:
        return None  # HttpSource handles the status, with Retry-After
    return TryAgain(f"status_{refusal.status}", f"S3 answers {refusal.code}")


def _waited(_: Refusal, __: Asked) -> Exception:
    # A transient 400: the server did not receive the whole request in time.
    return TryAgain("request_timeout", "S3 timed out waiting for the request")


def _denied(refusal: Refusal, asked: Asked) -> Exception:
    said = "" if refusal.message.lower() == "access denied" else _said(refusal)
    if asked.unsigned:
        return ForbiddenError(
            f"{asked.name}: access denied without credentials "
            f"({refusal.code or 'no reason given'}){said}.",
            hint="It is not public: unset TENSORSERVE_S3_UNSIGNED and give credentials. If the "
            "bucket may not be listed, S3 gives the same answer for a missing object.",
        )
    needed = {
        READ: "s3:GetObject and s3:ListBucket here; without the latter, S3 gives the same answer "
        "for a missing object",
        LIST: "s3:ListBucket and s3:GetObject here",
        WRITE: "s3:PutObject, s3:AbortMultipartUpload, s3:DeleteObject, s3:GetObject and "
        "s3:ListBucket here",
    }[asked.action]
    return ForbiddenError(
        f"{asked.name}: access denied ({refusal.code or 'no reason given'}){said}.",
        hint=f"The credentials need {needed}.",
    )


_Rule = Callable[[Refusal, Asked], Exception | None]
_BY_CODE: dict[str, _Rule] = {
    "NoSuchBucket": _no_bucket,
    "InvalidBucketName": _bad_name,
    "NoSuchKey": _no_key,
    "NoSuchVersion": _no_key,
    "MethodNotAllowed": _not_allowed,
    "PermanentRedirect": _other_region,
    "TemporaryRedirect": _other_region,
    "Redirect": _other_region,
    "AuthorizationHeaderMalformed": _other_region,
    "IllegalLocationConstraint": _other_region,
    "IllegalLocationConstraintException": _other_region,
    "RequestTimeTooSkewed": _skewed,
    "InvalidAccessKeyId": _unknown_keys,
    "SignatureDoesNotMatch": _unknown_keys,
    "InvalidToken": _unknown_keys,
    "ExpiredToken": _expired,
    "ExpiredTokenException": _expired,
    "TokenRefreshRequired": _expired,
    "RequestExpired": _request_expired,
    "InvalidObjectState": _archived,
    "AllAccessDisabled": _disabled,
    "AccountProblem": _disabled,
    "PreconditionFailed": _changed,
    "ConditionalRequestConflict": _changed,
    "KeyTooLongError": _too_long,
    "KeyTooLong": _too_long,
    "NotImplemented": _not_implemented,
    "SlowDown": _passing,
    "ServiceUnavailable": _passing,
    "InternalError": _passing,
    "Throttling": _passing,
    "ThrottlingException": _passing,
    "RequestTimeout": _waited,
}
# Ambiguous codes, for which the message decides.
_VAGUE = frozenset({"AccessDenied", "InvalidRequest", "InvalidArgument", "InvalidBucketName"})
_BY_WORDS: tuple[tuple[re.Pattern[str], _Rule], ...] = (
    (_KMS_ACTION, _kms),
    (_CUSTOMER_KEY, _customer_key),
    (_PAYER, _requester_pays),
    (_VIRTUAL_ONLY, _virtual_only),
)


def _skew(refusal: Refusal) -> str:
    try:
        there = parsedate_to_datetime(refusal.header("Date"))
    except ValueError:
        return "too much"
    seconds = time.time() - there.timestamp()
    return f"{abs(seconds):.0f} s (this machine is {'ahead' if seconds > 0 else 'behind'})"
