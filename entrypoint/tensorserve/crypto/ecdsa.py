"""How is a signature of OpenSSF's model signing made and verified?

With ECDSA (FIPS 186-5) and keys in PEM files. Curves and hashes are those of model-signing 1.1.1:
P-256 with SHA-256, P-384 with SHA-384, P-521 with SHA-512. `openssl genpkey -algorithm EC -pkeyopt
ec_paramgen_curve:P-256` makes a private key, `openssl pkey -pubout` its public one.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from tensorserve.errors import ConfigurationError
from tensorserve.secret import REDACTED, Secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

CURVES = ("secp256r1", "secp384r1", "secp521r1")
_MOST_KEYS = 16
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----[^-]*-----END PUBLIC KEY-----")
_HINT = (
    "Make a pair with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "
    "sign.pem` and `openssl pkey -in sign.pem -pubout -out sign.pub`."
)


class EcSigningKey:
    """A private key."""

    def __init__(self, key: EllipticCurvePrivateKey, origin: str) -> None:
        self._key = key
        self.public = EcVerifyingKey(key.public_key(), origin)
        self.origin = origin

    @classmethod
    def parse(cls, given: Secret) -> EcSigningKey:
        """From PEM (PKCS #8 or SEC 1, without a password). Raises ConfigurationError."""
        # Imported here: most starts need no signature, and the import takes a while.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            key = load_pem_private_key(given.reveal(), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
            raise ConfigurationError(
                f"{given.origin} is not an EC private key (P-256, P-384 or P-521) in PEM without a "
                "password.",
                hint=_HINT,
            )
        return cls(key, given.origin)

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`: DER of the two numbers."""
        return self._key.sign(message, self.public.algorithm)

    def __repr__(self) -> str:
        return f"EcSigningKey({REDACTED})"


class EcVerifyingKey:
    """A public key."""

    def __init__(self, key: EllipticCurvePublicKey, origin: str) -> None:
        """Raises ValueError for another curve than CURVES."""
        if key.curve.name not in CURVES:
            raise ValueError(f"its key is on the curve {key.curve.name}")
        self._key = key
        self.origin = origin

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of its PEM, as openssl writes it: `sha256sum sign.pub`."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        pem = self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(pem).hexdigest()

    @property
    def hash(self) -> HashAlgorithm:
        """The one of the curve's size."""
        from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512

        size = self._key.curve.key_size
        return SHA256() if size == 256 else SHA384() if size == 384 else SHA512()

    @property
    def algorithm(self) -> ECDSA:
        """ECDSA with that hash."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        return ECDSA(self.hash)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the private key of this one made `signature` of `message`."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, message, self.algorithm)
        except InvalidSignature:
            return False
        return True


def parse_public_keys(given: Secret) -> tuple[EcVerifyingKey, ...]:
    """The public keys in PEM (SubjectPublicKeyInfo), one after the other.

    Raises ConfigurationError where there is none, or one is of another kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: list[EcVerifyingKey] = []
    blocks = _PUBLIC_PEM.findall(given.reveal())
    for block in blocks[:_MOST_KEYS]:
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm):
            break
        if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
            break
        found.append(EcVerifyingKey(key, given.origin))
    if not found or len(found) != len(blocks):
        raise ConfigurationError(
            f"{given.origin} is not one or more (at most {_MOST_KEYS}) EC public keys (P-256, "
            "P-384 or P-521) in PEM.",
            hint=_HINT,
        )
    return tuple(found)
