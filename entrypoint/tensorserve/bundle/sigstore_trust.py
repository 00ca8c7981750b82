"""Did whoever has an identity at an OIDC issuer sign, by Sigstore's keyless signing?

The verdict is that of the `sigstore` library (extra `sigstore`; `model_signing verify sigstore`
asks it too), with a trust root that was given: nothing is fetched. It is imported only where such a
signature is asked for.
"""

from __future__ import annotations

import hashlib
from typing import Any

from tensorserve.bundle.signature_envelope import PAYLOAD_TYPE, Envelope
from tensorserve.bundle.signature_trust import CERTIFICATE, SignedBy
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

INSTALL = "pip install 'tensorserve[sigstore]' (or sigstore>=4.5,<5); the images do not have it."


class TrustedIdentity:
    """The subject of the signer's certificate and who vouched for it, below a trust root."""

    def __init__(self, identity: str, issuer: str, root: Any, origin: str) -> None:
        """`root` is a sigstore.models.TrustedRoot. Raises sigstore's errors for an incomplete one.

        `origin` is where the identity was said, for messages.
        """
        from sigstore.verify import Verifier

        self._identity = identity
        self._issuer = issuer
        self._verifier = Verifier(trusted_root=root)
        self.origin = origin

    @classmethod
    def parse(cls, identity: str, issuer: str, root: Secret) -> TrustedIdentity:
        """`root` is Sigstore's trusted_root.json. Raises ConfigurationError."""
        try:
            from sigstore.models import TrustedRoot
            from sigstore_models.trustroot.v1 import TrustedRoot as Document
        except ImportError as error:
            raise ConfigurationError(
                "TENSORSERVE_SIGNATURE_IDENTITY needs the library `sigstore`.", hint=INSTALL
            ) from error
        try:
            found = TrustedRoot(Document.from_json(root.reveal()))
            return cls(identity, issuer, found, "TENSORSERVE_SIGNATURE_IDENTITY")
        # A library with many layers (pydantic, cryptography) that raise their own.
        except Exception as error:  # noqa: BLE001
            raise ConfigurationError(
                f"{root.origin} is not Sigstore's trust root, with authorities and "
                f"logs ({said(error)}).",
                hint="It is the file trusted_root.json; docs/signatures.md says where it comes "
                "from.",
            ) from None

    @property
    def shown(self) -> str:
        """Whose signature is asked for, for `plan`."""
        return f"{self._identity} by {self._issuer} (Sigstore)"

    def signer(self, envelope: Envelope) -> SignedBy:
        """See signature_trust.Trust."""
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle
        from sigstore.verify.policy import Identity

        if envelope.keyless is None:
            raise ValueError(
                f"it was signed with a key, and {self.origin} asks for Sigstore's keyless signing"
            )
        policy = Identity(identity=self._identity, issuer=self._issuer)
        try:
            bundle = Bundle.from_json(envelope.keyless)
            kind, payload = self._verifier.verify_dsse(bundle, policy)
        except CertValidationError as error:
            raise ValueError(
                "its certificate is of no authority in the trust root, or was not valid when it "
                f"was signed ({said(error)})"
            ) from None
        # Whatever the library makes of hostile bytes, it is no acceptance.
        except Exception as error:  # noqa: BLE001
            raise ValueError(f"Sigstore's verification refuses it: {said(error)}") from None
        if (kind, payload) != (PAYLOAD_TYPE, envelope.payload):
            raise ValueError("two readers find two statements in it")
        from cryptography.hazmat.primitives.serialization import Encoding

        certificate = bundle.signing_certificate.public_bytes(Encoding.DER)
        fingerprint = hashlib.sha256(certificate).hexdigest()
        return SignedBy(CERTIFICATE, fingerprint, f"{self._identity} by {self._issuer}")


def said(error: Exception) -> str:
    """What `error` says, on one line, without control characters and of bounded length."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:300]
