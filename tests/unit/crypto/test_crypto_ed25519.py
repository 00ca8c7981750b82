"""Signatures with Ed25519 keys from PEM files, as `openssl` writes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tensorserve.crypto.ed25519 import SIGNATURE_SIZE, SigningKey, VerifyingKey
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Secret, Secret]:
    """(private, public) key, made as the hint of our errors says."""
    private, public = tmp_path / "sign.pem", tmp_path / "sign.pub"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return Secret(private.read_bytes(), "sign.pem"), Secret(public.read_bytes(), "sign.pub")


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def test_a_signature_is_verified_by_the_public_key(pair: tuple[Secret, Secret]) -> None:
    """64 bytes, and of this message only."""
    signature = SigningKey.parse(pair[0]).sign(b"message")
    assert len(signature) == SIGNATURE_SIZE
    key = VerifyingKey.parse(pair[1])
    assert key.verifies(signature, b"message")
    assert not key.verifies(signature, b"massage")
    assert not key.verifies(signature[:-1], b"message")
    assert not key.verifies(b"", b"message")


def test_openssl_verifies_it_too(pair: tuple[Secret, Secret], tmp_path: Path) -> None:
    """It is plain Ed25519, as others write and read it."""
    message, signature = tmp_path / "message", tmp_path / "signature"
    message.write_bytes(b"message")
    signature.write_bytes(SigningKey.parse(pair[0]).sign(b"message"))
    words = ("-verify", "-pubin", "-inkey", tmp_path / "sign.pub", "-rawin", "-in", message)
    openssl("pkeyutl", *words, "-sigfile", signature)


def test_what_is_no_such_key_is_refused(pair: tuple[Secret, Secret], tmp_path: Path) -> None:
    """Keys of other kinds, the other half of the pair, a password, and no key at all."""
    openssl("genpkey", "-algorithm", "rsa", "-out", tmp_path / "rsa.pem")
    openssl(
        "genpkey",
        "-algorithm",
        "ed25519",
        "-aes256",
        "-pass",
        "pass:x",
        "-out",
        tmp_path / "locked",
    )
    openssl("pkey", "-in", tmp_path / "rsa.pem", "-pubout", "-out", tmp_path / "rsa.pub")
    rsa, locked, rsa_public = (
        Secret((tmp_path / name).read_bytes(), name) for name in ("rsa.pem", "locked", "rsa.pub")
    )
    for bad in (rsa, locked, pair[1], Secret(b"", "an empty file"), Secret(bytes(32), "raw")):
        with pytest.raises(ConfigurationError, match=bad.origin):
            SigningKey.parse(bad)
    for bad in (rsa_public, pair[0], Secret(b"", "an empty file"), Secret(bytes(32), "raw")):
        with pytest.raises(ConfigurationError, match=bad.origin):
            VerifyingKey.parse(bad)


def test_a_private_key_is_not_printed(pair: tuple[Secret, Secret]) -> None:
    """Nor is anything of it in an error."""
    assert repr(SigningKey.parse(pair[0])) == "SigningKey(***)"
