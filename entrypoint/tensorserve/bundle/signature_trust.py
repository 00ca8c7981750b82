"""Whose signatures of a bundle are accepted?

Those of given public keys, or of who has a certificate below given ones. (Sigstore's identities:
sigstore_trust.py.)

The verdicts are those of `model_signing verify key` and `model_signing verify certificate` (1.1.1),
but for two things: signatures over the encoding of its releases before 1.0 are refused, and there
is no default set of certificates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tensorserve.bundle.signature_envelope import Envelope
from tensorserve.crypto.ecdsa import EcVerifyingKey, parse_public_keys
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

if TYPE_CHECKING:
    from cryptography import x509

KEY, CERTIFICATE = "key", "certificate"


@dataclass(frozen=True)
class SignedBy:
    """Who signed a bundle. ``str()`` is for messages."""

    kind: str
    """KEY or CERTIFICATE."""
    fingerprint: str
    """SHA-256 in hex: of the public key's PEM, or of the certificate's DER."""
    subject: str | None = None
    """The certificate's."""

    def __str__(self) -> str:
        named = f"{self.subject}, " if self.subject else ""
        return f"{named}{self.kind} {self.fingerprint}"


class Trust(Protocol):
    """Whose signatures are accepted."""

    origin: str
    """Where that was said, for messages."""

    @property
    def shown(self) -> str:
        """Whose signature is asked for, for `plan`."""
        ...

    def signer(self, envelope: Envelope) -> SignedBy:
        """Who made the signature. Raises ValueError unless it is valid and that one is accepted."""
        ...


class TrustedKeys:
    """Public keys, one of which has to be the signer's."""

    def __init__(self, keys: tuple[EcVerifyingKey, ...]) -> None:
        self._keys = keys
        self.origin = keys[0].origin

    @classmethod
    def parse(cls, given: Secret) -> TrustedKeys:
        """From PEM. Raises ConfigurationError."""
        return cls(parse_public_keys(given))

    @property
    def shown(self) -> str:
        """Whose signature is asked for, for `plan`."""
        return " or ".join(f"{KEY} {key.fingerprint}" for key in self._keys)

    def signer(self, envelope: Envelope) -> SignedBy:
        """See Trust."""
        _refuse_keyless(envelope, f"{self.origin} asks for a key")
        for key in self._keys:
            if key.verifies(envelope.signature, envelope.signed):
                return SignedBy(KEY, key.fingerprint)
        hint = f", but of key {envelope.key_hint[:64]!r}" if envelope.key_hint else ""
        raise ValueError(f"its signature is not of the key from {self.origin}{hint}")


class TrustedCertificates:
    """Certificates of authorities; one of them has to be above the signer's certificate.

    Validity is compared at the moment from which the signer's certificate is valid, as
    model-signing does: nothing in the file proves when it was signed.
    """

    def __init__(self, roots: tuple[x509.Certificate, ...], origin: str) -> None:
        self._roots = roots
        self.origin = origin

    @classmethod
    def parse(cls, given: Secret) -> TrustedCertificates:
        """From PEM. Raises ConfigurationError."""
        from cryptography import x509

        try:
            roots = tuple(x509.load_pem_x509_certificates(given.reveal()))
        except ValueError:
            roots = ()
        if not roots:
            raise ConfigurationError(
                f"{given.origin} is not one or more certificates in PEM.",
                hint="It holds those of the authorities, roots at least, that issue to signers.",
            )
        return cls(roots, given.origin)

    @property
    def shown(self) -> str:
        """Whose signature is asked for, for `plan`."""
        return f"a certificate below {' or '.join(map(subject_of, self._roots))}"

    def signer(self, envelope: Envelope) -> SignedBy:
        """See Trust."""
        from cryptography import x509

        _refuse_keyless(envelope, f"{self.origin} asks for a certificate of its own authorities")
        if not envelope.certificates:
            raise ValueError(
                f"it was signed with a key alone, and {self.origin} asks for a certificate"
            )
        try:
            certificates = [x509.load_der_x509_certificate(der) for der in envelope.certificates]
            leaf = certificates[0]
            self._check_chain(leaf, certificates[1:])
            may_sign, key = _may_sign(leaf), key_of(leaf)
        except _unreadable() as error:
            raise ValueError("one of its certificates cannot be read") from error
        if not may_sign:
            raise ValueError("its certificate is not for signing (keyUsage, extendedKeyUsage)")
        if not key.verifies(envelope.signature, envelope.signed):
            raise ValueError("its signature is not of its certificate's key")
        fingerprint = hashlib.sha256(envelope.certificates[0]).hexdigest()
        return SignedBy(CERTIFICATE, fingerprint, subject_of(leaf))

    def _check_chain(self, leaf: x509.Certificate, others: list[x509.Certificate]) -> None:
        from cryptography import x509
        from cryptography.x509 import verification

        agnostic = verification.Criticality.AGNOSTIC
        everything = verification.ExtensionPolicy.permit_all()
        # What OpenSSL asks of an authority, rather than what browsers ask.
        authority = everything.require_present(
            x509.BasicConstraints, agnostic, _refuse_no_authority
        ).may_be_present(x509.KeyUsage, agnostic, _refuse_no_issuer)
        verifier = (
            verification.PolicyBuilder()
            .store(verification.Store(list(self._roots)))
            .time(leaf.not_valid_before_utc.replace(tzinfo=None))
            .extension_policies(ca_policy=authority, ee_policy=everything)
            .build_client_verifier()
        )
        try:
            verifier.verify(leaf, others)
        except verification.VerificationError as error:
            raise ValueError(
                f"its certificate, of {subject_of(leaf)}, is not below those from {self.origin}"
            ) from error


def key_of(certificate: x509.Certificate) -> EcVerifyingKey:
    """The public key in `certificate`. Raises ValueError unless it is an EC key that can sign."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = certificate.public_key()
    except UnsupportedAlgorithm:
        raise ValueError("its certificate's key is of an unknown kind") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise ValueError("its certificate's key is not an EC key")
    return EcVerifyingKey(key, "the certificate")


def subject_of(certificate: x509.Certificate) -> str:
    """Its subject on one line (RFC 4514), without control characters and of bounded length."""
    text = certificate.subject.rfc4514_string()
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200] or "no name"


def _refuse_keyless(envelope: Envelope, wanted: str) -> None:
    if envelope.keyless is not None:
        raise ValueError(
            f"it was made with Sigstore's keyless signing, and {wanted} "
            "(TENSORSERVE_SIGNATURE_IDENTITY is for Sigstore's)"
        )


def _unreadable() -> tuple[type[Exception], ...]:
    """What `cryptography` raises for certificates that it cannot read, beside ValueError."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    return (
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
        UnsupportedAlgorithm,
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.KeyUsage) and value.digital_signature:
            return True
        if isinstance(value, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.CODE_SIGNING in value:
            return True
    return False


def _refuse_no_authority(
    _policy: object, _certificate: x509.Certificate, constraints: x509.BasicConstraints
) -> None:
    if not constraints.ca:
        raise ValueError("a certificate above the signer's is not an authority's")


def _refuse_no_issuer(
    _policy: object, _certificate: x509.Certificate, usage: x509.KeyUsage | None
) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("a certificate above the signer's may not issue others")
