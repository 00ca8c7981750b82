"""How is a signature made and verified? Ed25519 (RFC 8032), with keys in PEM files.

`openssl genpkey -algorithm ed25519` makes a private key, `openssl pkey -pubout` its public one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorserve.errors import ConfigurationError
from tensorserve.secret import REDACTED, Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE_SIZE = 64
_HINT = (
    "Make a pair with `openssl genpkey -algorithm ed25519 -out sign.pem` and "
    "`openssl pkey -in sign.pem -pubout -out sign.pub`."
)


class SigningKey:
    """A private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def parse(cls, given: Secret) -> SigningKey:
        """From PEM (PKCS #8, without a password). Raises ConfigurationError for anything else."""
        # Imported here: most starts need no signature, and the import takes a while.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(given.reveal(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigurationError(
                f"{given.origin} is not an Ed25519 private key in PEM without a password.",
                hint=_HINT,
            )
        return cls(key)

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`, 64 bytes."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({REDACTED})"


class VerifyingKey:
    """A public key."""

    def __init__(self, key: Ed25519PublicKey, origin: str) -> None:
        self._key = key
        self.origin = origin

    @classmethod
    def parse(cls, given: Secret) -> VerifyingKey:
        """From PEM (SubjectPublicKeyInfo). Raises ConfigurationError for anything else."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            key = load_pem_public_key(given.reveal())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigurationError(
                f"{given.origin} is not an Ed25519 public key in PEM.", hint=_HINT
            )
        return cls(key, given.origin)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the private key of this one made `signature` of `message`."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True
