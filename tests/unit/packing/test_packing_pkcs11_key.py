"""Keys in hardware modules: what the module gives becomes a signature, what it says no PIN.

A stand-in for model-signing's PKCS #11 signer and its module, with a key in memory: CI has no
module. By hand it was tried with SoftHSM 2.6.1.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from model_signers import Authority, verify_key
from tensorserve.crypto.ecdsa import EcVerifyingKey
from tensorserve.errors import ConfigurationError
from tensorserve.packing.model_signer import ModelSigner

URI = "pkcs11:token=t;object=k?pin-value=4711&module-path=/usr/lib/module.so"


class Module:
    """One key; `fault` is raised instead of what it is asked for."""

    def __init__(self, curve: Any = ec.SECP256R1) -> None:
        self.key = ec.generate_private_key(curve())
        self.fault: Exception | None = None
        self.broken: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self

        class Signer:
            _private_key = "the handle"

            def __init__(self, uri: str) -> None:
                assert uri == URI
                if module.fault is not None:
                    raise module.fault
                self.session = module

            def public_key(self) -> Any:
                return module.key.public_key()

        names: dict[str, Any] = {"Mechanism": lambda *words: words, "CKM_ECDSA": "ECDSA"}
        library = types.ModuleType("PyKCS11")
        library.__dict__.update(names)
        theirs = types.ModuleType("model_signing._signing.sign_pkcs11")
        theirs.__dict__["Signer"] = Signer
        monkeypatch.setitem(sys.modules, "PyKCS11", library)
        monkeypatch.setitem(sys.modules, "model_signing._signing.sign_pkcs11", theirs)

    def sign(self, handle: str, digest: bytes, *, mecha: Any) -> tuple[int, ...]:
        """As CKM_ECDSA does: both numbers, each of the curve's length."""
        assert (handle, mecha) == ("the handle", ("ECDSA", None))
        if self.broken is not None:
            raise self.broken
        hashes = {32: SHA256(), 48: SHA384(), 64: SHA512()}
        way = ec.ECDSA(utils.Prehashed(hashes[len(digest)]))
        length = (self.key.curve.key_size + 7) // 8
        numbers = utils.decode_dss_signature(self.key.sign(digest, way))
        return tuple(b"".join(number.to_bytes(length, "big") for number in numbers))


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_model_signing_accepts_what_a_module_signs(
    tmp_path: Path, curve: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other signature: the file does not tell where the key was."""
    module = Module(curve)
    module.install(monkeypatch)
    public = tmp_path / "module.pub"
    public.write_bytes(
        module.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_bytes(b"")
    signer = ModelSigner.read(URI, None)
    assert signer.by.fingerprint == EcVerifyingKey(module.key.public_key(), "").fingerprint
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (bundle / "model.sig").write_bytes(signer.sign({"manifest.json": empty}, "b"))
    code, said = verify_key(bundle, public)
    assert code == 0, said


def test_what_a_module_says_has_no_pin_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no token, a wrong PIN; and a token that is pulled out."""
    module = Module()
    module.install(monkeypatch)
    signer = ModelSigner.read(URI, None)
    module.broken = RuntimeError("CKR_DEVICE_REMOVED")
    with pytest.raises(ConfigurationError, match=r"object=k did not sign .*CKR_DEVICE_REMOVED"):
        signer.sign({"manifest.json": "0" * 64}, "b")
    for fault, said in (
        (RuntimeError("CKR_PIN_INCORRECT (0xA0)"), "RuntimeError: CKR_PIN_INCORRECT"),
        (ValueError(f"cannot parse {URI}"), r"sign \(ValueError\)"),
    ):
        module.fault = fault
        with pytest.raises(ConfigurationError, match=said) as caught:
            ModelSigner.read(URI, None)
        assert "4711" not in str(caught.value)
    module.fault, module.key = None, ec.generate_private_key(ec.SECP256K1())
    with pytest.raises(ConfigurationError, match="on the curve secp256k1"):
        ModelSigner.read(URI, None)


def test_without_the_extra_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a certificate of another key is refused as with a key in a file."""
    monkeypatch.setitem(sys.modules, "PyKCS11", None)
    with pytest.raises(ConfigurationError, match=r"tensorserve\[signing\]"):
        ModelSigner.read(URI, None)
    module = Module()
    module.install(monkeypatch)
    (tmp_path / "chain.pem").write_bytes(Authority("another").pem)
    with pytest.raises(ConfigurationError, match="is not that of the key"):
        ModelSigner.read(URI, tmp_path / "chain.pem")
