"""What is a provider: a service, or a file, that wraps the model's key and unwraps it?"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.errors import ConfigurationError, WrongKeyError
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources.base import AzureAccess, RetryPolicy, S3Access

KEY_BYTES = 32
CDH_URL = "http://127.0.0.1:8006"
_FINGERPRINT_INFO = b"tensorserve key fingerprint v1"
_KIND = re.compile(r"[a-z][a-z0-9]{1,15}")


def fingerprint_of(key: bytes) -> str:
    """The public name of a model's 32-byte key, in hex: HKDF-SHA256 of it, without a salt.

    It says nothing of a random key, and no other key has the same.
    """
    return hkdf_sha256(key, salt=b"", info=_FINGERPRINT_INFO).hex()


@dataclass(frozen=True)
class Binding:
    """The bundle that a wrapped key belongs to. Unwrapped for another one, it is refused."""

    manifest: str
    """The salt of the manifest's authentication, in hex."""
    key: str
    """The fingerprint of the model's key, in hex."""

    def context(self) -> dict[str, str]:
        """As a service takes it that binds names and values (AWS: the encryption context)."""
        return {"tensorserve": "model key v1", "manifest": self.manifest, "key": self.key}

    def text(self) -> bytes:
        """The same as associated data of a cipher."""
        return "\n".join(f"{name}={value}" for name, value in self.context().items()).encode()


@dataclass(frozen=True)
class WrappedKey:
    """The model's key, wrapped for one recipient, as the manifest has it."""

    provider: str
    """The provider's kind, a name of providers.KINDS. Another release may know more."""
    key: str
    """What the provider calls the wrapping key. Never an address: a manifest may be anybody's."""
    wrapped: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.provider}:{self.key}"


@dataclass(frozen=True)
class VaultAccess:
    """How Vault or OpenBao is reached. Without a role, the token is used as it is."""

    address: str | None = None
    namespace: str | None = None
    ca_file: str | None = None
    """A file or a directory with trusted CAs in PEM; None: the system's."""
    token: Secret | None = None
    auth_mount: str | None = None
    """Where the login method is mounted; None: under its own name."""
    kubernetes_role: str | None = None
    jwt_file: str = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    role_id: str | None = None
    secret_id: Secret | None = None


@dataclass(frozen=True)
class Services:
    """What providers may use: addresses and credentials, all from the environment."""

    vault: VaultAccess = field(default_factory=VaultAccess)
    s3: S3Access = field(default_factory=S3Access)
    """Of AWS, for its KMS too: credentials, region and CAs."""
    azure: AzureAccess = field(default_factory=AzureAccess)
    """For its service principal."""
    cdh_url: str = CDH_URL
    """The Confidential Data Hub of this guest, on this machine."""
    policy: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True)
class Reference:
    """A provider and a key of it, as a user names them: `vault://host/transit/models`."""

    kind: str
    host: str | None
    """host[:port] of the service; None: where the environment says."""
    key: str
    """May be empty: the one that the manifest names."""

    @classmethod
    def parse(cls, text: str, name: str) -> Reference:
        """From KIND:KEY or KIND://HOST/KEY. Raises ConfigurationError, which names `name`."""
        kind, colon, rest = text.partition(":")
        if not colon or not _KIND.fullmatch(kind):
            # Only the beginning is shown: somebody may have put a key here.
            raise ConfigurationError(
                f"{name} does not begin with the kind of a key: {kind[:16]!r}.",
                hint="For example file:/run/secrets/wrapping-key or vault:transit/models.",
            )
        if not rest.startswith("//"):
            return cls(kind, None, rest)
        host, slash, key = rest[2:].partition("/")
        if "@" in host or "?" in rest or "#" in rest:
            raise ConfigurationError(
                f"{name}: {redact_uri(text)} has a user, a query or a fragment in it.",
                hint="Credentials have variables of their own (docs/keys.md).",
            )
        return cls(kind, host or None, key if host else slash + key)

    def __str__(self) -> str:
        return (
            f"{self.kind}:{self.key}"
            if self.host is None
            else f"{self.kind}://{self.host}/{self.key}"
        )


class Provider(ABC):
    """One wrapping key of one provider. Its errors name the service and the key's name."""

    kind: ClassVar[str]
    proves_sender: ClassVar[bool]
    """Whether only who may use the wrapping key can wrap with it. False for a public key: anybody
    can wrap a key of his own for it."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What the manifest calls the wrapping key; empty: any key of this provider."""

    @abstractmethod
    def describe(self, key: str = "") -> str:
        """Provider, wrapping key and address, for messages; `key` where `self.key` is empty."""

    @abstractmethod
    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """The model's key, wrapped: ASCII. Raises TensorserveError."""

    @abstractmethod
    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """The model's 32-byte key.

        Raises WrongKeyError for what another key wrapped, or for another bundle;
        PermissionDeniedError, SourceUnavailableError or ConfigurationError.
        """

    def opens(self, entry: WrappedKey) -> bool:
        """Whether `entry` is for this wrapping key, as far as its name tells."""
        return entry.provider == self.kind and (not self.key or entry.key == self.key)


def foreign(described: str) -> WrongKeyError:
    """The error for a wrapped key that is not this bundle's, or not of this wrapping key."""
    return WrongKeyError(
        f"{described} does not unwrap the key in the manifest: it was wrapped for "
        "another bundle or with another wrapping key, or it is damaged.",
        hint="Copy the bundle's manifest.json again from where it was packed, and check who can "
        "write to this storage.",
    )
