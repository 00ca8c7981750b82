"""RSA keys of Azure Key Vault and Managed HSM, by their REST interface and azure-identity.

https://learn.microsoft.com/rest/api/keyvault/keys/wrap-key, RSA-OAEP-256. That has no associated
data: the vault wraps a fresh key-encryption key, which seals the model's key and the binding with
AES-256-GCM. Both are in the manifest, with the version of the RSA key.

Whoever has the public key can wrap, as with age: config/unwrapping.py demands the key's fingerprint
or a pin. A name says which vault, of any tenant, so that TENSORSERVE_KEY_URI alone gives it.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping

from tensorserve.crypto.aes_gcm import seal, unseal
from tensorserve.errors import ConfigurationError, PermissionDeniedError, WrongKeyError
from tensorserve.secret import Secret
from tensorserve.sources.cloud_account import CloudAccount
from tensorserve.sources.entra_token import EntraToken
from tensorserve.sources.library_logs import hold_back
from tensorserve.wrapping.base import (
    KEY_BYTES,
    Binding,
    Provider,
    Reference,
    Services,
    WrappedKey,
    foreign,
)
from tensorserve.wrapping.rest import Endpoint, base64_field, because, no_service, refusal
from tensorserve.wrapping.service_key import ServiceKey

_API = "api-version=7.4"
_ALGORITHM = "RSA-OAEP-256"
_VAULT = re.compile(r"[a-z](?:[a-z0-9-]{1,22})[a-z0-9]")
# No other host gets a token but this machine.
_HOST = re.compile(
    rf"{_VAULT.pattern}\.((?:vault|managedhsm)\.(?:azure\.net|azure\.cn|usgovcloudapi\.net))"
    r"|(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?"
)
_SUFFIX = "vault.azure.net"
_KEY = re.compile(r"[A-Za-z0-9-]{1,127}")
_VERSION = re.compile(r"[0-9a-f]{32}")
_WAYS = (
    "Set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET of a service principal, or give "
    "the machine or pod an identity."
)


class _Entra(CloudAccount):
    """A bearer token for one service."""

    def __init__(self, token: EntraToken) -> None:
        super().__init__()
        hold_back()
        self._token = token

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`."""
        del method, url, length
        with self.lock:
            return {**headers, "Authorization": f"Bearer {self._token.get()}"}

    def _renewed(self) -> bool:
        return self._token.renewed()


class _VaultKey(ServiceKey):
    kind = "azurekeyvault"
    proves_sender = False

    def __init__(self, host: str, key: str, version: str, services: Services) -> None:
        """`key`: VAULT/NAME; `version`: empty for the current one."""
        super().__init__(key, services)
        self._url = f"https://{host}/keys/{key.rpartition('/')[2]}"
        self._version = version
        found = _HOST.fullmatch(host)
        scope = f"https://{(found and found[1]) or _SUFFIX}/.default"
        token = EntraToken(services.azure, scope, "azurekeyvault:", _WAYS)
        self._endpoint = Endpoint(_Entra(token), services)

    def named(self, key: str) -> str:
        """As ServiceKey.named."""
        return f"azurekeyvault:{key}"

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: the version, the wrapped key-encryption key, what that sealed."""
        key = os.urandom(KEY_BYTES)
        answer, value = self._ask("wrapkey", self._version, key)
        version = str(answer.get("kid")).rpartition("/")[2]
        if not _VERSION.fullmatch(version):
            raise no_service(self.describe())
        sealed = seal(key, model_key.reveal(), binding.text())
        return ":".join((version, *(base64.b64encode(box).decode() for box in (value, sealed))))

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        try:
            version, *boxes = entry.wrapped.split(":")
            value, sealed = (base64.b64decode(box, validate=True) for box in boxes)
            if not _VERSION.fullmatch(version):
                raise ValueError("no version")
        except ValueError as error:
            raise foreign(self.describe()) from error
        if self._version and version != self._version:
            raise WrongKeyError(
                f"{self.describe()}: the key was wrapped with version {version}, and the URI names "
                f"{self._version}.",
                hint="Leave the version out, or wrap it anew: `tensorserve rewrap URI --add …`.",
            )
        _, key = self._ask("unwrapkey", version, value)
        try:
            return unseal(key, sealed, binding.text())
        except ValueError as error:
            raise foreign(self.describe()) from error

    def _ask(self, verb: str, version: str, value: bytes) -> tuple[dict[str, object], bytes]:
        """The answer, and the bytes in it."""
        name = self.describe()
        text = base64.urlsafe_b64encode(value).decode().rstrip("=")
        # Without a version it is empty, as Microsoft's own libraries send it.
        url = f"{self._url}/{version}/{verb}?{_API}"

        def ask() -> tuple[dict[str, object], bytes]:
            document = {"alg": _ALGORITHM, "value": text}
            answer = self._endpoint.post(url, name, _Refused(name, verb).explain, document)
            return answer, base64_field(answer, "value", name, urlsafe=True)

        return self.asked(self.key, ask)


class _Refused:
    """What a refusal of one request means. Statuses that pass are left to the caller."""

    def __init__(self, name: str, verb: str) -> None:
        self._name = name
        self._action = {"wrapkey": "wrapKey", "unwrapkey": "unwrapKey"}[verb]

    def explain(self, status: int, _headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As sources.cloud_account.Explain."""
        code, text = refusal(body)
        name, action, why = self._name, self._action, because(text)
        refused = f"{name}: {action} is refused ({code or status}){why}."
        if status == 404:
            return ConfigurationError(
                f"{name}: there is no such key, or no such version{why}.",
                hint="`az keyvault key list --vault-name …` shows the keys.",
            )
        if status in {401, 403}:
            return PermissionDeniedError(
                refused,
                hint="Grant these credentials the role Key Vault Crypto User on this key, or in an "
                f"access policy the permission {action}; the key has to be enabled, and the "
                "vault's firewall to let this machine in.",
            )
        if status == 400 and action == "unwrapKey":
            error = foreign(name)
            error.add_note(f"The vault answers {code or status}{why}.")
            return error
        if status == 400:
            return ConfigurationError(
                refused, hint=f"The key has to be of type RSA, with {action} among its operations."
            )
        return None


def to_wrap(reference: Reference, services: Services) -> Provider:
    """The key of azurekeyvault://VAULT/KEY[/VERSION]. Raises ConfigurationError."""
    host, name, version = _parts(reference)
    return _VaultKey(host, name, version, services)


to_unwrap = to_wrap


def name_of(reference: Reference) -> str:
    """VAULT/KEY, as a manifest has it. Raises ConfigurationError for what is none."""
    return _parts(reference)[1]


def place(reference: Reference, services: Services) -> str:
    """Where it would be asked, and as whom, for `plan`. Raises ConfigurationError."""
    given = services.azure
    whole = given.client_secret is not None and given.tenant_id and given.client_id
    how = "a service principal" if whole else "azure-identity's default credentials"
    return f"at {_parts(reference)[0]}, with {how}"


def _parts(reference: Reference) -> tuple[str, str, str]:
    """(host, VAULT/KEY, version or empty). Raises ConfigurationError."""
    text = reference.key if reference.host is None else f"{reference.host}/{reference.key}"
    vault, _, rest = text.strip("/").partition("/")
    vault, (key, _, version) = vault.lower(), rest.partition("/")
    host = vault if "." in vault or ":" in vault else f"{vault}.{_SUFFIX}"
    if (
        not _HOST.fullmatch(host)
        or not _KEY.fullmatch(key)
        or (version and not _VERSION.fullmatch(version))
    ):
        raise ConfigurationError(
            f"{str(reference)[:200]} names no key of Azure Key Vault.",
            hint="For example azurekeyvault://my-vault/models, or azurekeyvault://"
            "my-vault.vault.azure.cn/models; a version, if any, has 32 hex digits.",
        )
    return host, f"{vault}/{key}", version
