"""Keys of Vault's or OpenBao's transit engine, by their client hvac.

https://openbao.org/api-docs/secret/transit/: the wrapping key never leaves the service. The bundle
is bound as associated data, which the AEAD types of keys have (aes256-gcm96, the default).

The address and the credentials are from the environment, or the address is in
TENSORSERVE_KEY_URI. A manifest names mount and key alone.
"""

from __future__ import annotations

import base64
import binascii
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tensorserve.crypto.secret_file import read_absolute
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.secret import Secret
from tensorserve.sources.cloud_account import said
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.retry import TryAgain
from tensorserve.wrapping.base import (
    Binding,
    Provider,
    Reference,
    Services,
    VaultAccess,
    WrappedKey,
    foreign,
)
from tensorserve.wrapping.service_key import ServiceKey

# Of a mount's path and of a key: no part that is only dots, which would lead to another path.
_PART = r"(?!\.+(?:/|$))[A-Za-z0-9_.-]+"
_KEY = re.compile(rf"{_PART}(?:/{_PART})+")
_SECONDS = 10.0  # for one request
_TOO_OLD = "version is disallowed by policy"
_NO_KEY = ("encryption key not found", "no existing key named")
_FOREIGN = ("message authentication failed", "invalid ciphertext", "decryption failed", "base64")


class _Transit(ServiceKey):
    kind = "vault"
    proves_sender = True

    def __init__(self, access: VaultAccess, key: str, services: Services) -> None:
        """`key`: MOUNT/NAME; empty: the one of the entry that is unwrapped."""
        if key:
            _split(key)
        super().__init__(key, services)
        self.access = access

    def named(self, key: str) -> str:
        """As ServiceKey.named."""
        return f"vault:{key} at {self.access.address}"

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: what transit gives, `vault:v1:…`."""
        given = {"plaintext": base64.b64encode(model_key.reveal()).decode()}
        return self._ask("encrypt", self._key, given, binding, "ciphertext")

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        key = self._key or entry.key
        plain = self._ask("decrypt", key, {"ciphertext": entry.wrapped}, binding, "plaintext")
        try:
            return base64.b64decode(plain, validate=True)
        except binascii.Error as error:
            raise foreign(self.named(key)) from error

    def _ask(
        self, verb: str, key: str, given: dict[str, str], binding: Binding, wanted: str
    ) -> str:
        mount, name = _split(key)
        where = f"/v1/{mount}/{verb}/{name}"
        data = given | {"associated_data": base64.b64encode(binding.text()).decode()}

        def ask() -> str:
            with _session(self.access) as client, _explained(self, key, where):
                answer = client.adapter.post(where, json=data)
            found = answer.get("data") if isinstance(answer, dict) else None
            value = found.get(wanted) if isinstance(found, dict) else None
            if not isinstance(value, str):
                raise SourceUnavailableError(
                    f"{self.named(key)}: what answers is no transit engine.",
                    hint="Check the address and the mount; a redirect is not followed.",
                )
            return value

        return self.asked(key, ask)


def to_wrap(reference: Reference, services: Services) -> Provider:
    """The transit key of vault:MOUNT/KEY. Raises ConfigurationError."""
    if not reference.key:
        raise _no_key(str(reference))
    return to_unwrap(reference, services)


def to_unwrap(reference: Reference, services: Services) -> Provider:
    """The transit key of vault:MOUNT/KEY or vault://HOST/MOUNT/KEY; without a key, any that the
    manifest names. Raises ConfigurationError."""
    access = _access(reference, services)
    if access.address is None:
        raise ConfigurationError(
            f"{reference}: no address of Vault is set.",
            hint="Set VAULT_ADDR, or name the host: vault://vault.example:8200/transit/models.",
        )
    return _Transit(access, reference.key, services)


def is_configured(services: Services) -> bool:
    """Whether a start may take its key from Vault because a manifest says so."""
    access = services.vault
    return access.address is not None and (access.token is not None or _login(access) is not None)


def place(reference: Reference, services: Services) -> str:
    """Where it would be asked, and how one would log in, for `plan`."""
    access = _access(reference, services)
    how = _login(access) or ("a token" if access.token is not None else "no credentials")
    return f"at {access.address or 'no address: VAULT_ADDR is not set'}, with {how}"


def _access(reference: Reference, services: Services) -> VaultAccess:
    """That of the environment; a host in the reference goes before the address there."""
    if reference.host is None:
        return services.vault
    return replace(services.vault, address=f"https://{reference.host}")


def _login(access: VaultAccess) -> str | None:
    if access.kubernetes_role is not None:
        return f"Kubernetes role {access.kubernetes_role!r}"
    return "an AppRole" if access.role_id is not None else None


def _split(key: str) -> tuple[str, str]:
    """(mount, name). Raises ConfigurationError for what would be another path of the service."""
    if not _KEY.fullmatch(key):
        raise _no_key(f"vault:{key}")
    mount, _, name = key.rpartition("/")
    return mount, name


def _no_key(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text[:200]} names no key of a transit engine.",
        hint="It is the engine's mount and the key's name: vault:transit/models.",
    )


@contextmanager
def _session(access: VaultAccess) -> Iterator[Any]:
    """A client that is logged in. The token of a login is revoked at the end."""
    hvac = _library()
    hold_back()
    client = hvac.Client(
        url=access.address,
        token=access.token.reveal_text() if access.token is not None else "",
        namespace=access.namespace,
        verify=access.ca_file or _system_cas(),
        timeout=_SECONDS,
        # requests would send the token to the host that a redirect names.
        allow_redirects=False,
    )
    logged_in = False
    try:
        logged_in = _log_in(client, access)
        yield client
    finally:
        if logged_in:
            # It expires by itself as well.
            with suppress(Exception):
                client.auth.token.revoke_self()
        client.adapter.close()


def _log_in(client: Any, access: VaultAccess) -> bool:
    if access.kubernetes_role is not None:
        jwt = read_absolute(access.jwt_file, "The service account's token")
        mount = access.auth_mount or "kubernetes"
        _at_login(
            access,
            mount,
            lambda: client.auth.kubernetes.login(
                access.kubernetes_role, jwt.reveal_text().strip(), mount_point=mount
            ),
        )
        return True
    if access.role_id is not None and access.secret_id is not None:
        mount, secret = access.auth_mount or "approle", access.secret_id
        _at_login(
            access,
            mount,
            lambda: client.auth.approle.login(
                access.role_id, secret.reveal_text(), mount_point=mount
            ),
        )
        return True
    if access.token is None:
        raise PermissionDeniedError(
            f"There are no credentials for Vault at {access.address}.",
            hint="Set VAULT_TOKEN_FILE, TENSORSERVE_VAULT_KUBERNETES_ROLE, or "
            "TENSORSERVE_VAULT_ROLE_ID and TENSORSERVE_VAULT_SECRET_ID_FILE.",
        )
    return False


def _at_login(access: VaultAccess, mount: str, log_in: Callable[[], object]) -> None:
    what = _login(access)
    with _transport(str(access.address)):
        try:
            log_in()
        except _library().exceptions.VaultError as error:
            _raise_passing(error)
            raise PermissionDeniedError(
                f"Vault at {access.address} refuses to log {what} in by auth/{mount}: "
                f"{said(error)}.",
                hint="Check role, mount (TENSORSERVE_VAULT_AUTH_MOUNT) and namespace "
                "(VAULT_NAMESPACE), and what the role is bound to.",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise SourceUnavailableError(
                f"What answers at {access.address} is no Vault.", hint="Check VAULT_ADDR."
            ) from error


@contextmanager
def _explained(transit: _Transit, key: str, where: str) -> Iterator[None]:
    """Turns hvac's errors about one request into this package's; TryAgain for what passes."""
    errors = _library().exceptions
    name = transit.named(key)
    with _transport(str(transit.access.address)):
        try:
            yield
        except errors.VaultError as error:
            _raise_passing(error)
            raise _final(error, name, where) from error
        except ValueError as error:  # JSON that is none
            raise SourceUnavailableError(
                f"{name}: what answers is no Vault.", hint="Check VAULT_ADDR."
            ) from error


def _raise_passing(error: Any) -> None:
    errors = _library().exceptions
    # 500, 501, 502, 503 (sealed, or a standby without a leader), 429, 412.
    passing = (
        errors.InternalServerError,
        errors.VaultNotInitialized,
        errors.BadGateway,
        errors.VaultDown,
        errors.RateLimitExceeded,
        errors.PreconditionFailed,
    )
    if isinstance(error, passing):
        raise TryAgain("key_service", f"it answers {said(error)}") from error


def _final(error: Any, name: str, where: str) -> TensorserveError:
    errors = _library().exceptions
    text = said(error)
    asked = where.removeprefix("/v1/")
    if isinstance(error, errors.Forbidden | errors.Unauthorized):
        return PermissionDeniedError(
            f"{name}: permission denied for {asked}.",
            hint=f'Grant it in a policy: path "{asked}" {{ capabilities = ["update"] }}. Or the '
            "token has expired, or is of another namespace (VAULT_NAMESPACE).",
        )
    if _TOO_OLD in text:
        return PermissionDeniedError(
            f"{name}: the key was wrapped with a version that min_decryption_version excludes.",
            hint="Wrap it anew: `tensorserve rewrap URI --add …` with the same key.",
        )
    if isinstance(error, errors.InvalidPath) or any(words in text for words in _NO_KEY):
        return ConfigurationError(
            f"{name}: there is no such key, or no transit engine at this mount: {text}.",
            hint="`bao list MOUNT/keys` shows the keys.",
        )
    if "/decrypt/" in where and any(words in text for words in _FOREIGN):
        return foreign(name)
    return ConfigurationError(
        f"{name} refuses {asked}: {text}.",
        hint="The key has to be of a type with associated data, such as aes256-gcm96.",
    )


@contextmanager
def _transport(address: str) -> Iterator[None]:
    from requests.exceptions import ConnectionError, InvalidSchema, InvalidURL, SSLError, Timeout

    try:
        yield
    except SSLError as error:
        raise SourceUnavailableError(
            f"Vault at {address}: its certificate is not trusted: {said(error)}.",
            hint="Set VAULT_CACERT to the file of its CA.",
        ) from error
    except (ConnectionError, Timeout) as error:
        raise TryAgain("key_service", f"{urlsplit(address).netloc} cannot be reached") from error
    except (InvalidSchema, InvalidURL, OSError) as error:
        raise ConfigurationError(
            f"Vault at {address} cannot be asked: {said(error)}.",
            hint="Check VAULT_ADDR, and the file of VAULT_CACERT.",
        ) from error


def _system_cas() -> str | bool:
    """The file with the system's CAs, as for S3; True: those of requests."""
    paths = ssl.get_default_verify_paths()
    debian = Path(paths.capath or "/etc/ssl/certs") / "ca-certificates.crt"
    return paths.cafile or (str(debian) if debian.is_file() else True)


def _library() -> Any:
    try:
        import hvac
        import hvac.exceptions
    except ImportError as error:
        raise ConfigurationError(
            "vault: needs hvac, which is not installed here.",
            hint="Install it: pip install 'tensorserve[vault]'.",
        ) from error
    return hvac
