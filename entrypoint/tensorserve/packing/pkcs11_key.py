"""How is a bundle signed with a key that stays in a hardware module? By a PKCS #11 URI (RFC 7512).

model-signing's own signer finds the module, logs in and finds the key (1.1.1, extra `signing`);
what is signed is given here, since bundles may be in a bucket, and it hashes local directories.
"""

from __future__ import annotations

from typing import Any

from tensorserve.crypto.ecdsa import CURVES, EcVerifyingKey
from tensorserve.errors import ConfigurationError

SCHEME = "pkcs11:"


class Pkcs11Key:
    """A private key in a module; see packing.model_signer.SigningKey."""

    def __init__(self, uri: str) -> None:
        """Opens a session and finds the key. Raises ConfigurationError, without a PIN."""
        # What follows the question mark may be a PIN.
        self.origin = uri.partition("?")[0][:200]
        try:
            import PyKCS11
            from model_signing._signing.sign_pkcs11 import Signer
        except ImportError as error:
            raise ConfigurationError(
                f"{self.origin}: keys in hardware modules need the extra `signing`.",
                hint="pip install 'tensorserve[signing]'",
            ) from error
        try:
            self._signer: Any = Signer(uri)
            key = self._signer.public_key()
            if key.curve.name not in CURVES:
                raise ValueError(f"its key is on the curve {key.curve.name}")
        # A vendor's module, and what is between, may raise anything.
        except Exception as error:  # noqa: BLE001
            said = f" ({_without_pin(error, uri)})"
            raise ConfigurationError(
                f"{self.origin} gives no EC key that can sign{said}.",
                hint="The URI names token and object, and behind a question mark pin-value or "
                "pin-source, and module-path: pkcs11:token=T;object=K?pin-source=/run/pin&"
                "module-path=/usr/lib/module.so",
            ) from None
        self._mechanism = PyKCS11.Mechanism(PyKCS11.CKM_ECDSA, None)
        self.public = EcVerifyingKey(key, self.origin)

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`: DER of the two numbers. Raises ConfigurationError."""
        from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
        from cryptography.hazmat.primitives.hashes import Hash

        digest = Hash(self.public.hash)
        digest.update(message)
        try:
            raw = bytes(
                self._signer.session.sign(
                    self._signer._private_key, digest.finalize(), mecha=self._mechanism
                )
            )
        except Exception as error:  # noqa: BLE001 - as above
            raise ConfigurationError(
                f"{self.origin} did not sign ({type(error).__name__}: {str(error)[:200]}).",
                hint="Is the key one that may sign, and does the token still answer?",
            ) from None
        # PKCS #11 gives both numbers, each of half the length.
        half = len(raw) // 2
        numbers = (int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        return encode_dss_signature(*numbers)


def _without_pin(error: Exception, uri: str) -> str:
    """What the `error` says, unless it repeats a part of the URI that may be a secret."""
    text = str(error).partition("\n")[0][:200]
    secrets = [part.partition("=")[2] for part in uri.partition("?")[2].split("&")]
    if any(secret and secret in text for secret in secrets):
        return type(error).__name__
    return f"{type(error).__name__}: {text}"
