"""A wrapping key in a file: 32 bytes, AES-256-GCM (NIST SP 800-38D) with a random nonce.

For a secret that an orchestrator mounts, where one wrapping key serves many models. The manifest
names the wrapping key by its fingerprint, never by its path.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import TYPE_CHECKING

from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.crypto.key_text import key_bytes
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
from tensorserve.wrapping.small_files import read_small

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
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
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher().encrypt(nonce, model_key.reveal(), binding.text())
        return base64.b64encode(nonce + sealed).decode()

    def unwrap(self, entry: WrappedKey, binding: Binding) -> bytes:
        """As Provider.unwrap."""
        from cryptography.exceptions import InvalidTag

        try:
            box = base64.b64decode(entry.wrapped, validate=True)
            nonce, sealed = box[:_NONCE_BYTES], box[_NONCE_BYTES:]
            opened: bytes = self._cipher().decrypt(nonce, sealed, binding.text())
        except (binascii.Error, ValueError, InvalidTag) as error:
            raise foreign(self.describe()) from error
        return opened

    def _cipher(self) -> AESGCM:
        # Imported here: it takes some hundredths of a second, and most starts need none.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._secret.reveal())


def to_wrap(reference: Reference, _services: Services) -> Provider:
    """The wrapping key at file:PATH. Raises ConfigurationError."""
    if reference.host is not None:
        raise ConfigurationError(
            f"{reference}: a wrapping key is in a file of this machine.",
            hint="For example file:/run/secrets/wrapping-key.",
        )
    secret = read_small(reference.key, "The wrapping key")
    key = key_bytes(secret.reveal())
    if key is None:
        raise ConfigurationError(
            f"The wrapping key {secret.origin} is not {KEY_BYTES} bytes, raw or as hex or base64.",
            hint="Make one with `openssl rand -hex 32`.",
        )
    return FileKey(Secret(key, secret.origin))


to_unwrap = to_wrap
