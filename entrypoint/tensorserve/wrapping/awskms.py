"""Symmetric keys of AWS KMS. The encryption context binds the bundle.

https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html. Credentials, region, proxies
and CAs are those of S3 (botocore's chain); the endpoint is AWS's, AWS_ENDPOINT_URL_KMS, or the host
in TENSORSERVE_KEY_URI.

KMS decrypts with any key that the credentials may use, one of another account among them. So the
key is always named in the request; one that only a manifest names must be of the own account and
region: an ID or an alias, no ARN.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorserve.errors import ConfigurationError, PermissionDeniedError, SourceUnavailableError
from tensorserve.secret import Secret
from tensorserve.sources.cloud_account import said
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.s3_client import S3Account, account_for
from tensorserve.sources.s3_credentials import passes, provider_errors
from tensorserve.wrapping.base import Binding, Provider, Reference, Services, WrappedKey, foreign
from tensorserve.wrapping.service_key import ServiceKey

_ARN = re.compile(
    r"arn:aws[a-z-]*:kms:(?P<region>[a-z0-9-]+):[0-9]{12}:(key|alias)/[A-Za-z0-9/_-]+"
)
_LOCAL = re.compile(r"alias/[A-Za-z0-9/_-]+|[A-Za-z0-9-]+")
_PASSING = frozenset(
    """DependencyTimeoutException KMSInternalException KeyUnavailableException
    LimitExceededException ThrottlingException InternalFailure InternalError ServiceUnavailable
    RequestTimeout""".split()
)
_FOREIGN = frozenset({"InvalidCiphertextException", "IncorrectKeyException"})
_UNUSABLE = frozenset({"DisabledException", "KMSInvalidStateException", "InvalidKeyUsageException"})


class _KmsKey(ServiceKey):
    kind = "awskms"
    proves_sender = True

    def __init__(self, key: str, host: str | None, services: Services) -> None:
        """`key`: an ID, an alias or an ARN; empty: the one of the entry that is unwrapped."""
        super().__init__(key, services)
        self._host = host

    def named(self, key: str) -> str:
        """As ServiceKey.named."""
        account: S3Account = account_for(self.services.s3)
        place = self._host or self._region(key, account)
        return f"awskms:{key} in {place}"

    def opens(self, entry: WrappedKey) -> bool:
        """As Provider.opens. One key has several names, so that KMS decides."""
        return entry.provider == self.kind

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: base64 of KMS's ciphertext."""
        answer = self._ask("encrypt", self._key, binding, Plaintext=model_key.reveal())
        return base64.b64encode(answer["CiphertextBlob"]).decode()

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        if not self._key and not _LOCAL.fullmatch(entry.key):
            raise ConfigurationError(
                f"The manifest names {entry}: a key of any account and region may be named so.",
                hint=f"If it is yours, set TENSORSERVE_KEY_URI={entry}.",
            )
        try:
            blob = base64.b64decode(entry.wrapped, validate=True)
        except binascii.Error as error:
            raise foreign(self.describe(entry.key)) from error
        answer = self._ask("decrypt", self._key or entry.key, binding, CiphertextBlob=blob)
        return bytes(answer["Plaintext"])

    def _ask(self, verb: str, key: str, binding: Binding, **given: bytes) -> Any:
        def ask() -> Any:
            account: S3Account = account_for(self.services.s3)
            with provider_errors():
                client = account.other_client(
                    "kms",
                    region=self._region(key, account),
                    endpoint=None if self._host is None else f"https://{self._host}",
                )
            with self._explained(verb, key):
                return getattr(client, verb)(
                    KeyId=key, EncryptionContext=binding.context(), **given
                )

        return self.asked(key, ask)

    def _region(self, key: str, account: S3Account) -> str:
        arn = _ARN.fullmatch(key)
        return arn["region"] if arn else account.region

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turns botocore's errors into this package's; TryAgain for what passes."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        name, action = self.named(key), f"kms:{verb.capitalize()}"
        try:
            yield
        except ClientError as error:
            raise self._refused(error, name, action) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise PermissionDeniedError(
                f"{name}: there are no AWS credentials.",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role.",
            ) from error
        except BotoCoreError as error:
            if passes(error):
                raise TryAgain("key_service", f"it cannot be reached: {said(error)}") from error
            raise SourceUnavailableError(
                f"{name}: {said(error)}.",
                hint="Check AWS_REGION, AWS_ENDPOINT_URL_KMS and AWS_CA_BUNDLE.",
            ) from error

    def _refused(self, error: Any, name: str, action: str) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        text = said(error.response.get("Error", {}).get("Message") or "no reason is given")
        if code in _PASSING or status >= 500:
            return TryAgain("key_service", f"it answers {code or status}")
        if code in _FOREIGN:
            return foreign(name)
        if code == "NotFoundException":
            return ConfigurationError(
                f"{name}: there is no such key: {text}.",
                hint="Check the key's name, the account of the credentials and AWS_REGION.",
            )
        if code in _UNUSABLE:
            return PermissionDeniedError(
                f"{name}: the key cannot be used ({code}): {text}.",
                hint="It has to be enabled, symmetric, and for encryption.",
            )
        if status in {400, 401, 403} and code != "ValidationException":
            return PermissionDeniedError(
                f"{name}: {action} is refused ({code}): {text}.",
                hint=f"Allow {action} on this key for these credentials, in the key's policy or by "
                "IAM; the encryption context may be a condition (docs/keys.md).",
            )
        return ConfigurationError(
            f"{name}: {action} is refused ({code or status}): {text}.",
            hint="Does AWS_ENDPOINT_URL name a store? Set AWS_ENDPOINT_URL_KMS then.",
        )


def to_wrap(reference: Reference, services: Services) -> Provider:
    """The key of awskms:KEY. Raises ConfigurationError."""
    if not reference.key:
        raise _no_key(str(reference))
    return to_unwrap(reference, services)


def to_unwrap(reference: Reference, services: Services) -> Provider:
    """The key of awskms:KEY or awskms://HOST/KEY; without one, any that the manifest names.

    Raises ConfigurationError.
    """
    # As other tools write it: awskms:///alias/models.
    key = reference.key.removeprefix("/")
    if key and not (_ARN.fullmatch(key) or _LOCAL.fullmatch(key)):
        raise _no_key(str(reference))
    return _KmsKey(key, reference.host, services)


def is_configured(services: Services) -> bool:
    """Whether a start may take its key from KMS because a manifest says so: with credentials."""
    try:
        account_for(services.s3)
    except PermissionDeniedError:
        return False
    return not services.s3.unsigned


def place(reference: Reference, services: Services) -> str:
    """Where it would be asked, for `plan`."""
    return f"in {reference.host or services.s3.region or 'the region of the AWS configuration'}"


def _no_key(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text[:200]} names no key of AWS KMS.",
        hint="For example awskms:alias/models, awskms:KEY-ID or awskms:arn:aws:kms:…",
    )
