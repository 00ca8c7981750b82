"""Which error and hint does a refusal of Azure Blob Storage become, from its code?

Codes: https://learn.microsoft.com/rest/api/storageservices/blob-service-error-codes, in the header
x-ms-error-code or the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources.base import ForbiddenError, NotFoundError, ReplacedError
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.s3_errors import LIST, READ, WRITE, Refusal

_NEEDED = {
    READ: "the role Storage Blob Data Reader on the container, or a SAS with r and l",
    LIST: "the role Storage Blob Data Reader on the container, or a SAS with r and l for the "
    "container",
    WRITE: "the role Storage Blob Data Contributor on the container, or a SAS with r, l, c, w and "
    "d for the container",
}


@dataclass(frozen=True)
class Asked:
    """The request that was refused."""

    name: str
    """The URI of the blob or prefix, for messages."""
    container: str
    account: str
    action: str = READ

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """The error for a refusal; None if its HTTP status suffices."""
        refusal = Refusal.of_answer(status, headers, body)
        rule = _RULES.get(refusal.code) or _BY_STATUS.get(status)
        return rule(refusal, self) if rule is not None else None


def _said(refusal: Refusal) -> str:
    """The message without its last lines, which name the request and the time."""
    text = refusal.details.get("Message", "").partition("\n")[0]
    whole = Refusal(refusal.code, refusal.status, refusal.headers, {"Message": text})
    return f": {whole.message}" if whole.message else ""


def _no_container(_: Refusal, asked: Asked) -> Exception:
    return SourceUnavailableError(
        f"The container {asked.container!r} does not exist in the storage account "
        f"{asked.account!r}.",
        hint="Check both names: az://container/prefix, AZURE_STORAGE_ACCOUNT.",
    )


def _no_blob(refusal: Refusal, asked: Asked) -> Exception:
    if asked.action == LIST:
        return _no_container(refusal, asked)
    return NotFoundError(f"{asked.name} does not exist.", hint="Check container and prefix.")


def _denied(refusal: Refusal, asked: Asked) -> Exception:
    return ForbiddenError(
        f"{asked.name}: access denied ({refusal.code or 'no reason given'}){_said(refusal)}.",
        hint=f"The credentials need {_NEEDED[asked.action]}; and the account's firewall has to let "
        "this machine in.",
    )


def _unauthenticated(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: Azure does not accept the credentials "
        f"({refusal.code or refusal.status}){_said(refusal)}.",
        hint="Check that key or SAS are this account's, that the SAS has not expired, and this "
        "machine's clock (NTP).",
    )


def _no_keys(_: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the storage account does not allow shared keys.",
        hint="Unset AZURE_STORAGE_KEY (or the connection string), and use an identity of Entra ID.",
    )


def _disabled(refusal: Refusal, asked: Asked) -> Exception:
    return PermissionDeniedError(
        f"{asked.name}: the storage account {asked.account!r} is disabled ({refusal.code}).",
        hint="Ask the account's owner.",
    )


def _archived(refusal: Refusal, asked: Asked) -> Exception:
    return SourceUnavailableError(
        f"{asked.name} is in the archive tier and cannot be read ({refusal.code}).",
        hint="Rehydrate it first (`az storage blob set-tier --tier Hot`), which takes hours.",
    )


def _customer_key(refusal: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name} is encrypted with a customer-provided key, which is not supported "
        f"({refusal.code}).",
        hint="Store it with Azure's keys or Key Vault's; `tensorserve pack --encrypt` encrypts the "
        "weights before the upload.",
    )


def _bad_name(refusal: Refusal, asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.name}: Azure does not accept this name ({refusal.code}).",
        hint="Check the URI: az://container/prefix.",
    )


def _changed(_: Refusal, asked: Asked) -> Exception:
    return ReplacedError(
        f"{asked.name} was replaced while it was {'written' if asked.action == WRITE else 'read'}.",
        hint="Start again; upload models under a new name instead of over an old one.",
    )


def _timed_out(refusal: Refusal, _: Asked) -> Exception | None:
    if refusal.status >= 500:
        return None  # by the status, with Retry-After
    return TryAgain("request_timeout", f"Azure answers {refusal.code}")


_Rule = Callable[[Refusal, Asked], Exception | None]
_RULES: dict[str, _Rule] = {
    "ContainerNotFound": _no_container,
    "ContainerBeingDeleted": _no_container,
    "BlobNotFound": _no_blob,
    # What anonymous requests get for a container that is not public.
    "ResourceNotFound": _no_blob,
    "AuthenticationFailed": _unauthenticated,
    "InvalidAuthenticationInfo": _unauthenticated,
    "NoAuthenticationInformation": _unauthenticated,
    "AuthorizationFailure": _denied,
    "AuthorizationPermissionMismatch": _denied,
    "AuthorizationResourceTypeMismatch": _denied,
    "AuthorizationServiceMismatch": _denied,
    "AuthorizationProtocolMismatch": _denied,
    "AuthorizationSourceIPMismatch": _denied,
    "InsufficientAccountPermissions": _denied,
    "PublicAccessNotPermitted": _denied,
    "KeyBasedAuthenticationNotPermitted": _no_keys,
    "AccountIsDisabled": _disabled,
    "BlobArchived": _archived,
    "BlobBeingRehydrated": _archived,
    "BlobUsesCustomerSpecifiedEncryption": _customer_key,
    "InvalidResourceName": _bad_name,
    "InvalidUri": _bad_name,
    "OutOfRangeInput": _bad_name,
    "ConditionNotMet": _changed,
    "TargetConditionNotMet": _changed,
    "OperationTimedOut": _timed_out,
}
_BY_STATUS: dict[int, _Rule] = {401: _unauthenticated, 403: _denied, 404: _no_blob}
