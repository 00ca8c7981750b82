"""Who signs bundles in tests: key pairs, certificates below a private CA, and `model_signing`."""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tensorserve.packing.model_signer import ModelSigner

_DAY = datetime.timedelta(days=1)
_SECONDS = 120.0
NO_USAGE = dict.fromkeys(
    (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ),
    False,
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A private key and its public one, in PEM files."""

    private: Path
    public: Path

    @property
    def signer(self) -> ModelSigner:
        """Who signs with it."""
        return ModelSigner.read(self.private, None)


def make_pair(directory: Path, name: str = "sign", curve: Any = ec.SECP256R1) -> Pair:
    """A new pair, as openssl writes it."""
    key = ec.generate_private_key(curve())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return Pair(private, public)


@dataclass
class Authority:
    """A certificate authority, which issues to signers and to authorities below it."""

    name: str
    above: Authority | None = None
    ca: bool = True
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        issuer = self.above or self
        builder = _builder(self.name, issuer.name, self.key.public_key(), 10)
        self.certificate = builder.add_extension(
            x509.BasicConstraints(ca=self.ca, path_length=None), critical=True
        ).sign(issuer.key, hashes.SHA256())

    def issue(
        self, pair: Pair, *, name: str = "a signer", days: int = 1, usage: str | None = "signature"
    ) -> bytes:
        """PEM of a certificate of `pair`'s key and of the authorities above it but the root.

        `usage`: signature, code, none (key agreement alone), or None: nothing is said.
        """
        key = _private(pair).public_key()
        builder = _builder(name, self.name, key, days)
        if usage == "code":
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
        elif usage is not None:
            word = "digital_signature" if usage == "signature" else "key_agreement"
            builder = builder.add_extension(x509.KeyUsage(**NO_USAGE | {word: True}), True)
        pem = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        authority = self
        while authority.above is not None:
            pem += authority.certificate.public_bytes(Encoding.PEM)
            authority = authority.above
        return pem

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


def model_signing(*words: object) -> tuple[int, str]:
    """(exit code, what it printed) of the real `model_signing` command, run in this process."""
    from click.testing import CliRunner
    from model_signing._cli import main

    done = CliRunner().invoke(main, list(map(str, words)))
    return done.exit_code, done.output


def model_signing_process(*words: object) -> tuple[int, str]:
    """The same as a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def verify_key(bundle: Path, public: Path) -> tuple[int, str]:
    """What it says of a downloaded bundle, with the signer's public key."""
    return model_signing(*_verifying(bundle, public))


def verify_key_process(bundle: Path, public: Path) -> tuple[int, str]:
    """The same as a process of its own."""
    return model_signing_process(*_verifying(bundle, public))


def _verifying(bundle: Path, public: Path) -> tuple[object, ...]:
    return "verify", "key", bundle, "--signature", bundle / "model.sig", "--public_key", public


def _private(pair: Pair) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return load_pem_private_key(pair.private.read_bytes(), None)


def _builder(
    subject: str, issuer: str, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """Valid for `days` days, until tomorrow or, where they are negative, until yesterday."""
    now = datetime.datetime.now(datetime.UTC)
    end = now + _DAY if days > 0 else now - _DAY
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - _DAY * max(abs(days), 2))
        .not_valid_after(end)
    )
