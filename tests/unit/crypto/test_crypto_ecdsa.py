"""EC keys in PEM: those of OpenSSF's model signing, and no others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from model_signers import make_pair
from tensorserve.crypto.ecdsa import EcSigningKey, parse_public_keys
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

SUBJECT = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_what_one_key_signs_no_other_verifies(tmp_path: Path, curve: type) -> None:
    """And a key's name is the SHA-256 of its file."""
    own, other = make_pair(tmp_path, "own", curve), make_pair(tmp_path, "other", curve)
    signing = EcSigningKey.parse(Secret(own.private.read_bytes(), "own"))
    signature = signing.sign(b"message")
    both = parse_public_keys(Secret(own.public.read_bytes() + other.public.read_bytes(), "both"))
    assert [key.verifies(signature, b"message") for key in both] == [True, False]
    assert not signing.public.verifies(signature, b"massage")
    assert not signing.public.verifies(b"", b"message")
    assert both[0].fingerprint == hashlib.sha256(own.public.read_bytes()).hexdigest()
    assert "***" in repr(signing)


def test_other_keys_are_refused_without_showing_them(tmp_path: Path) -> None:
    """Other curves and kinds, a password, half a file; of several public keys, each."""
    k1, password = ec.generate_private_key(ec.SECP256K1()), BestAvailableEncryption(b"password")
    pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
    for private in (
        k1.private_bytes(*pkcs8, NoEncryption()),
        ed25519.Ed25519PrivateKey.generate().private_bytes(*pkcs8, NoEncryption()),
        rsa.generate_private_key(65537, 2048).private_bytes(*pkcs8, NoEncryption()),
        ec.generate_private_key(ec.SECP256R1()).private_bytes(*pkcs8, password),
        make_pair(tmp_path).private.read_bytes()[:80],
        b"",
    ):
        with pytest.raises(ConfigurationError, match="the file is not an EC private key") as caught:
            EcSigningKey.parse(Secret(private, "the file"))
        assert private[40:60].decode() not in str(caught.value) or not private
    good = make_pair(tmp_path).public.read_bytes()
    for public in (
        k1.public_key().public_bytes(*SUBJECT),
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*SUBJECT),
        make_pair(tmp_path, "private").private.read_bytes(),
        good + k1.public_key().public_bytes(*SUBJECT),
        good * 17,
        good.replace(b"M", b"?", 1),
        b"no key",
    ):
        with pytest.raises(ConfigurationError, match="the file is not one or more"):
            parse_public_keys(Secret(public, "the file"))
