"""Which error and hint does a refusal of Google Cloud Storage become?

Its XML API has S3's document with codes of its own
(https://cloud.google.com/storage/docs/xml-api/reference-status), its JSON API an object `error`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources.base import ForbiddenError, NotFoundError
from tensorserve.sources.s3_errors import LIST, READ, WRITE, Refusal

_NEEDED = {
    READ: "roles/storage.objectViewer on the bucket (storage.objects.get and .list); without the "
    "latter, Google gives the same answer for a missing object",
    LIST: "storage.objects.list on the bucket, as roles/storage.objectViewer has it",
    WRITE: "roles/storage.objectUser on the bucket (storage.objects.create, .delete, .get, .list)",
}


@dataclass(frozen=True)
class Asked:
    """The request that was refused."""

    name: str
    """The URI of the object or prefix, for messages."""
    bucket: str
    action: str = READ
    unsigned: bool = False

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """The error for a refusal; None if its HTTP status suffices."""
        refusal = Refusal.of_answer(status, headers, body)
        if not refusal.code and body.lstrip()[:1] == b"{":
            refusal = _of_json(status, headers, body)
        rule = _RULES.get(refusal.code) or _BY_STATUS.get(status)
        return rule(refusal, self) if rule is not None else None


def _of_json(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    try:
        document: Any = read_json(body)
        error = document["error"]
        reason = str(error["errors"][0]["reason"]) if error.get("errors") else ""
        message = str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return Refusal("", status, headers, {})
    return Refusal(reason, status, headers, {"Code": reason, "Message": message})


def _said(refusal: Refusal) -> str:
    return f": {refusal.message}" if refusal.message else ""


def _no_bucket(_: Refusal, asked: Asked) -> Exception:
    return SourceUnavailableError(
        f"The bucket {asked.bucket!r} does not exist.", hint="Check the bucket's name."
    )


def _not_found(refusal: Refusal, asked: Asked) -> Exception:
    # A prefix without objects is an empty list: what is missing is the bucket.
    if asked.action == LIST or "bucket" in refusal.message.lower():
        return _no_bucket(refusal, asked)
    return NotFoundError(f"{asked.name} does not exist.", hint="Check the bucket and the prefix.")


def _unauthorized(refusal: Refusal, asked: Asked) -> Exception:
    if asked.unsigned:
        return _denied(refusal, asked)
    return PermissionDeniedError(
        f"{asked.name}: Google does not accept the token (status 401){_said(refusal)}.",
        hint="Get new credentials: the key may have been deleted, or the token may have expired.",
    )


def _denied(refusal: Refusal, asked: Asked) -> Exception:
    if asked.unsigned:
        return ForbiddenError(
            f"{asked.name}: access denied without credentials.",
            hint="It is not public: unset TENSORSERVE_GCS_UNSIGNED and give credentials. If the "
            "bucket may not be listed, Google gives the same answer for a missing object.",
        )
    return ForbiddenError(
        f"{asked.name}: access denied{_said(refusal)}.",
        hint=f"The credentials need {_NEEDED[asked.action]}.",
    )


def _payer(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the bucket is a requester-pays bucket{_said(refusal)}.",
        hint="Set GOOGLE_CLOUD_QUOTA_PROJECT to the project that pays; the credentials need "
        "serviceusage.services.use on it.",
    )


def _bad_name(_: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.bucket!r} is not a valid bucket name for Google.",
        hint="Check the URI: gs://bucket/prefix.",
    )


def _disabled(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the project or its billing is disabled ({refusal.code}){_said(refusal)}.",
        hint="Ask the bucket's owner.",
    )


def _customer_key(refusal: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name} is encrypted with a customer-supplied key (CSEK), which is not supported "
        f"({refusal.code}).",
        hint="Store it with Google's keys or Cloud KMS's; `tensorserve pack --encrypt` encrypts "
        "the weights before the upload.",
    )


_Rule = Callable[[Refusal, Asked], Exception]
_RULES: dict[str, _Rule] = {
    "NoSuchBucket": _no_bucket,
    "NoSuchKey": _not_found,
    "notFound": _not_found,
    "InvalidBucketName": _bad_name,
    "AccessDenied": _denied,
    "forbidden": _denied,
    "AuthenticationRequired": _unauthorized,
    "authError": _unauthorized,
    "required": _unauthorized,
    "ExpiredToken": _unauthorized,
    "InvalidSecurity": _unauthorized,
    "UserProjectMissing": _payer,
    "UserProjectAccessDenied": _payer,
    "UserProjectInconsistent": _payer,
    "UserProjectInvalid": _payer,
    "userProjectMissing": _payer,
    "ResourceIsEncryptedWithCustomerEncryptionKey": _customer_key,
    "resourceIsEncryptedWithCustomerEncryptionKey": _customer_key,
    "AccountProblem": _disabled,
    "UserProjectAccountProblem": _disabled,
    "accountDisabled": _disabled,
}
_BY_STATUS: dict[int, _Rule] = {401: _unauthorized, 403: _denied, 404: _not_found}
