"""A wrapping key in a file: 32 bytes, AES-256-GCM with a random nonce.

For a secret that an orchestrator mounts, where one wrapping key serves many models. The manifest
names the wrapping key by its fingerprint, never by its path.
"""

from __future__ import annotations

import base64

from tensorserve.crypto.aes_gcm import seal, unseal
from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.crypto.key_text import key_bytes
from tensorserve.crypto.secret_file import read_absolute
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.wrapping.base import (
    KEY_BYTES,
    Binding,
    Provider,
    Reference,
    Services,
    WrappedKey,
    foreign,
)

_NAME_INFO, _NAME_BYTES = b"tensorserve wrapping key name v1", 8


class FileKey(Provider):
    """A wrapping key that was read from a file."""

    kind = "file"
    proves_sender = True

    def __init__(self, secret: Secret) -> None:
        """`secret`: 32 bytes; its origin is the path."""
        self._secret = secret
        name = hkdf_sha256(secret.reveal(), salt=b"", info=_NAME_INFO, length=_NAME_BYTES)
        self._name = name.hex()

    @property
    def key(self) -> str:
        """The wrapping key's fingerprint, 16 hex digits."""
        return self._name

    def describe(self, key: str = "") -> str:  # noqa: ARG002 - Provider's interface
        """As Provider.describe."""
        return f"file:{self._secret.origin} (wrapping key {self._name})"

    def wrap(self, model_key: Secret, binding: Binding) -> str:
        """As Provider.wrap: base64 of nonce, ciphertext and tag."""
        sealed = seal(self._secret.reveal(), model_key.reveal(), binding.text())
        return base64.b64encode(sealed).decode()

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        try:
            # binascii's error is a ValueError.
            box = base64.b64decode(entry.wrapped, validate=True)
            return unseal(self._secret.reveal(), box, binding.text())
        except ValueError as error:
            raise foreign(self.describe()) from error


def to_wrap(reference: Reference, _services: Services) -> Provider:
    """The wrapping key at file:PATH. Raises ConfigurationError."""
    if reference.host is not None:
        raise ConfigurationError(
            f"{reference}: a wrapping key is in a file of this machine.",
            hint="For example file:/run/secrets/wrapping-key.",
        )
    return FileKey(wrapping_key(read_absolute(reference.key, "The wrapping key")))


def wrapping_key(secret: Secret) -> Secret:
    """The 32 bytes in `secret`: raw, or as hex or base64. Raises ConfigurationError, which names
    its origin."""
    key = key_bytes(secret.reveal())
    if key is None:
        raise ConfigurationError(
            f"The wrapping key {secret.origin} is not {KEY_BYTES} bytes, raw or as hex or base64.",
            hint="Make one with `openssl rand -hex 32`.",
        )
    return Secret(key, secret.origin)


to_unwrap = to_wrap
