"""How is a bundle signed? OpenSSF model signing, with a key, or a key and its certificates.

Without a key of one's own: keyless_signer.py.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, FileEntry
from tensorserve.bundle.model_signature import is_ignored, parse_signature, statement_of
from tensorserve.bundle.signature_envelope import (
    certificate_material,
    envelope_text,
    key_material,
    signed_bytes,
)
from tensorserve.bundle.signature_trust import (
    CERTIFICATE,
    KEY,
    SignedBy,
    Trust,
    TrustedKeys,
    key_of,
    subject_of,
)
from tensorserve.crypto.ecdsa import EcSigningKey, EcVerifyingKey
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError
from tensorserve.format.writer import Output
from tensorserve.packing.pkcs11_key import SCHEME, Pkcs11Key
from tensorserve.secret import redact_uri


class SigningKey(Protocol):
    """A private key, wherever it is."""

    origin: str
    """For messages."""
    public: EcVerifyingKey

    def sign(self, message: bytes) -> bytes:
        """The signature of `message`: DER of the two numbers."""
        ...


class BundleSigner(ABC):
    """Signs bundles."""

    @property
    @abstractmethod
    def by(self) -> SignedBy:
        """Who signs. Of a keyless signer, it is known once something was signed."""

    @property
    @abstractmethod
    def trust(self) -> Trust:
        """Accepts this signer's signatures. Raises ConfigurationError if he is not known yet."""

    def sign(self, files: Mapping[str, str], uri: str) -> bytes:
        """The content of `model.sig` for `files` ({name: SHA-256 in hex}) of the bundle at `uri`.

        Files that signatures leave out (model_signature.IGNORED) are left out here.
        """
        name = redact_uri(uri).partition("?")[0].rstrip("/").rpartition("/")[2] or "model"
        return self._signed(
            statement_of({n: d for n, d in files.items() if not is_ignored(n)}, name)
        )

    @abstractmethod
    def _signed(self, payload: bytes) -> bytes:
        """The content of `model.sig`, read again: what cannot be read must not replace what can."""

    def sign_bundle(
        self, tensors: Mapping[str, str], small: Iterable[FileEntry], manifest: bytes, uri: str
    ) -> bytes:
        """The same for a bundle of .tensors files ({name: SHA-256}), small files and manifest."""
        files = {
            **tensors,
            **{entry.name: entry.sha256 for entry in small},
            MANIFEST: hashlib.sha256(manifest).hexdigest(),
        }
        return self.sign(files, uri)


class ModelSigner(BundleSigner):
    """Signs with a private key; `certificates` (DER, the signer's first) go into the signature."""

    def __init__(self, key: SigningKey, certificates: tuple[bytes, ...] = ()) -> None:
        """Raises ConfigurationError unless the first certificate is of `key`."""
        self._key = key
        self._certificates = certificates
        self._trust = TrustedKeys((key.public,))
        self._by = SignedBy(KEY, key.public.fingerprint)
        if certificates:
            self._by = _certified(key, certificates[0])

    @classmethod
    def read(cls, key: str | Path, certificates: Path | None) -> ModelSigner:
        """From PEM files; the key may be a URI of PKCS #11. Raises ConfigurationError."""
        signing: SigningKey
        if str(key).startswith(SCHEME):
            signing = Pkcs11Key(str(key))
        else:
            signing = EcSigningKey.parse(read_secret(key, f"The signing key {key}"))
        return cls(signing, () if certificates is None else _read_certificates(certificates))

    @property
    def by(self) -> SignedBy:
        """See BundleSigner."""
        return self._by

    @property
    def trust(self) -> TrustedKeys:
        """Accepts the signatures of this key, with certificates or without."""
        return self._trust

    def _signed(self, payload: bytes) -> bytes:
        material = (
            certificate_material(self._certificates)
            if self._certificates
            else key_material(self._key.public.fingerprint)
        )
        made = envelope_text(payload, self._key.sign(signed_bytes(payload)), material)
        parse_signature(made, SIGNATURE, self.trust)
        return made


class HashedOutput:
    """Writes on to another output, and hashes what goes through."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview, /) -> object:
        """See Output."""
        self._digest.update(data)
        return self._out.write(data)

    def sha256(self) -> str:
        """Of all that was written, in hex."""
        return self._digest.hexdigest()


def _read_certificates(path: Path) -> tuple[bytes, ...]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    data = read_secret(path, f"The certificate file {path}")
    try:
        found = x509.load_pem_x509_certificates(data.reveal())
    except ValueError:
        found = []
    if not found:
        raise ConfigurationError(
            f"{path} is not one or more certificates in PEM.",
            hint="It holds the signer's certificate first, then those between it and the root.",
        )
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in found)


def _certified(key: SigningKey, der: bytes) -> SignedBy:
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    try:
        fits = key_of(certificate).fingerprint == key.public.fingerprint
    except ValueError:
        fits = False
    if not fits:
        raise ConfigurationError(
            f"The first certificate, of {subject_of(certificate)}, is not that of the key from "
            f"{key.origin}.",
            hint="The file holds the signer's certificate first, then those above it.",
        )
    return SignedBy(CERTIFICATE, hashlib.sha256(der).hexdigest(), subject_of(certificate))
