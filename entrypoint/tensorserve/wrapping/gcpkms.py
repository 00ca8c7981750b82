"""Symmetric keys of Google Cloud KMS, by its REST interface and google-auth.

https://cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys. The
bundle is bound as additional authenticated data. CRC32C of all that is sent and answered is
compared, as https://cloud.google.com/kms/docs/data-integrity-guidelines asks for.

A key's full name says which project it is of, and in a project of his own anybody can let everybody
decrypt. So the key is named by TENSORSERVE_KEY_URI alone, never by a manifest.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from tensorserve.crypto.crc32c import crc32c
from tensorserve.errors import ConfigurationError, PermissionDeniedError
from tensorserve.secret import Secret
from tensorserve.sources.google_account import GoogleAccount
from tensorserve.sources.retry import TryAgain
from tensorserve.wrapping.base import Binding, Provider, Reference, Services, WrappedKey, foreign
from tensorserve.wrapping.rest import Endpoint, base64_field, because, refusal
from tensorserve.wrapping.service_key import ServiceKey

_SCOPE = "https://www.googleapis.com/auth/cloudkms"
_HOST = "cloudkms.googleapis.com"
_KEY = re.compile(
    r"projects/[a-z0-9][a-z0-9.:-]*/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]+"
    r"/cryptoKeys/[A-Za-z0-9_-]+"
)
_AT = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?")
_GIVEN = {"encrypt": "plaintext", "decrypt": "ciphertext"}
_ANSWERED = {"encrypt": "ciphertext", "decrypt": "plaintext"}
_VERIFIED = ("verifiedPlaintextCrc32c", "verifiedAdditionalAuthenticatedDataCrc32c")


class _KmsKey(ServiceKey):
    kind = "gcpkms"
    proves_sender = True

    def __init__(self, key: str, host: str | None, services: Services) -> None:
        super().__init__(key, services)
        self._host = host or _HOST
        self._endpoint = Endpoint(GoogleAccount(_SCOPE, "gcpkms:"), services)

    def named(self, key: str) -> str:
        """As ServiceKey.named."""
        return f"gcpkms:{key} at {self._host}"

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: base64 of KMS's ciphertext."""
        return base64.b64encode(self._ask("encrypt", model_key.reveal(), binding)).decode()

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        try:
            blob = base64.b64decode(entry.wrapped, validate=True)
        except binascii.Error as error:
            raise foreign(self.describe()) from error
        return self._ask("decrypt", blob, binding)

    def _ask(self, verb: str, data: bytes, binding: Binding) -> bytes:
        name, given, associated = self.describe(), _GIVEN[verb], binding.text()
        document = {
            given: base64.b64encode(data).decode(),
            f"{given}Crc32c": str(crc32c(data)),
            "additionalAuthenticatedData": base64.b64encode(associated).decode(),
            "additionalAuthenticatedDataCrc32c": str(crc32c(associated)),
        }
        url = f"https://{self._host}/v1/{self.key}:{verb}"

        def ask() -> bytes:
            answer = self._endpoint.post(url, name, _Refused(name, verb).explain, document)
            if verb == "encrypt" and not all(answer.get(field) is True for field in _VERIFIED):
                raise TryAgain("key_service", "it did not get what was sent (CRC32C)")
            found = base64_field(answer, _ANSWERED[verb], name, urlsafe=False)
            if str(answer.get(f"{_ANSWERED[verb]}Crc32c")) != str(crc32c(found)):
                raise TryAgain("key_service", "its answer came damaged (CRC32C)")
            return found

        return self.asked(self.key, ask)


class _Refused:
    """What a refusal of one request means. Statuses that pass are left to the caller."""

    def __init__(self, name: str, verb: str) -> None:
        self._name, self._verb = name, verb

    def explain(self, status: int, _headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As sources.cloud_account.Explain."""
        code, text = refusal(body)
        name, verb, why = self._name, self._verb, because(text)
        if status == 400 and "crc32c" in text.lower():
            return TryAgain("key_service", "it did not get what was sent (CRC32C)")
        if verb == "decrypt" and code == "INVALID_ARGUMENT" and "ecryption failed" in text:
            return foreign(name)
        if status == 404:
            return ConfigurationError(
                f"{name}: there is no such key{why}.",
                hint="`gcloud kms keys list --location … --keyring …` shows the keys.",
            )
        if code == "FAILED_PRECONDITION":
            return PermissionDeniedError(
                f"{name}: the key cannot be used{why}.",
                hint="The version that wrapped it has to be enabled, and the key's purpose is "
                "symmetric encryption.",
            )
        if status in {401, 403}:
            role = f"roles/cloudkms.cryptoKey{verb.capitalize()}er"
            return PermissionDeniedError(
                f"{name}: {verb} is refused ({code or status}){why}.",
                hint=f"Grant {role} (cloudkms.cryptoKeyVersions.useTo{verb.capitalize()}) on this "
                "key to these credentials, and enable the Cloud KMS API in its project.",
            )
        if status == 400:
            return ConfigurationError(
                f"{name}: {verb} is refused ({code or status}){why}.",
                hint="The key's purpose has to be symmetric encryption (ENCRYPT_DECRYPT).",
            )
        return None


def to_wrap(reference: Reference, services: Services) -> Provider:
    """The key of gcpkms:projects/…, or gcpkms://HOST/projects/…. Raises ConfigurationError."""
    host = _host(reference)
    return _KmsKey(name_of(reference), host, services)


to_unwrap = to_wrap


def name_of(reference: Reference) -> str:
    """The key's full name, as a manifest has it. Raises ConfigurationError for what is none."""
    # As other tools write it: gcpkms://projects/…
    key = reference.key if reference.host != "projects" else f"projects/{reference.key}"
    key = key.removeprefix("/")
    if not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{str(reference)[:200]} names no key of Google Cloud KMS.",
            hint="Its full name, without a version: "
            "gcpkms:projects/P/locations/L/keyRings/R/cryptoKeys/K.",
        )
    return key


def place(reference: Reference, services: Services) -> str:  # noqa: ARG001 - as other kinds have it
    """Where it would be asked, for `plan`. Raises ConfigurationError."""
    name_of(reference)
    return f"at {_host(reference) or _HOST}, with Google's Application Default Credentials"


def _host(reference: Reference) -> str | None:
    host = reference.host if reference.host != "projects" else None
    if host is not None and not _AT.fullmatch(host):
        raise ConfigurationError(
            f"{str(reference)[:200]}: {host!r} is no host.",
            hint="A regional or a private endpoint: gcpkms://HOST/projects/…",
        )
    return host
