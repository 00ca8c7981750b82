"""Which keys and signatures are asked for, and do they fit together?"""

from __future__ import annotations

from typing import Any

from tensorserve.config.variable_reader import VariableReader
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

_IDENTITY = ("signature_identity", "signature_issuer", "signature_trust_root")
_TRUST = ("signature_key", "signature_certificates", _IDENTITY[0])


def check_keys(reader: VariableReader, values: dict[str, Any]) -> None:
    """Check keys and passphrase; replaces keys by their 32 bytes."""
    if values["key"] is not None and values["passphrase"] is not None:
        reader.problem(
            "Both a key and a passphrase are set: a file is sealed with one of them.",
            "Unset TENSORSERVE_KEY(_FILE) or TENSORSERVE_PASSPHRASE(_FILE).",
        )
    given = [name for name in ("key", "passphrase") if values[name] is not None]
    if given and values["key_uri"] is not None:
        reader.problem(f"Both TENSORSERVE_KEY_URI and a {given[0]} are set.", "Set one of them.")
    if values["passphrase"] is not None and values["key_fingerprint"] is not None:
        reader.problem(
            "TENSORSERVE_KEY_FINGERPRINT is for keys, and a passphrase is set.",
            "Unset one of them; TENSORSERVE_MANIFEST_SHA256 pins a bundle.",
        )
    for name in ("key", "compiled_key", "adapters_key"):
        if values.get(name) is not None:
            values[name] = _parsed_key(reader, values[name], f"TENSORSERVE_{name.upper()}")
    if values.get("compiled_signature_key") is not None:
        _check_public_key(reader, values["compiled_signature_key"])
    _check_trust(reader, values)


def _parsed_key(reader: VariableReader, key: Secret, name: str) -> Secret | None:
    from tensorserve.bundle.keys import parse_key

    if name in reader.environ and len(key.reveal()) == 32:
        reader.problem(
            f"The key from {key.origin} is 32 characters of text: a key is 64 hex digits, or "
            "base64 of 32 bytes.",
            "If it is a passphrase, set TENSORSERVE_PASSPHRASE instead. 32 raw bytes are taken "
            f"from a file alone: {name}_FILE.",
        )
        return None
    try:
        return Secret(parse_key(key).reveal(), key.origin)
    except ConfigurationError as error:
        reader.problems.append(str(error))
        return None


def _check_public_key(reader: VariableReader, key: Secret) -> None:
    from tensorserve.crypto.ed25519 import VerifyingKey

    try:
        VerifyingKey.parse(key)
    except ConfigurationError as error:
        reader.problems.append(str(error))


def _check_trust(reader: VariableReader, values: dict[str, Any]) -> None:
    given = [name for name in _TRUST if values[name] is not None]
    if len(given) > 1:
        one, other = (f"TENSORSERVE_{name.upper()}" for name in given[:2])
        reader.problem(
            f"Both {one} and {other} are set: a bundle has one signature.",
            "Set one of them. TENSORSERVE_SIGNATURE_KEY may hold several keys.",
        )
    identity = [values[name] is not None for name in _IDENTITY]
    if any(identity) and not all(identity):
        if not reader.problems:  # a file that cannot be read is said already
            missing = [
                f"TENSORSERVE_{name.upper()}{'_FILE' * (name == _IDENTITY[-1])}"
                for name in _IDENTITY
                if values[name] is None
            ]
            reader.problem(
                f"Sigstore's signatures need {' and '.join(missing)} as well.",
                "Whoever has an account at any issuer can sign: identity, issuer and trust root "
                "belong together (docs/signatures.md).",
            )
        return
    for name in given:
        try:
            _parse_trust(name, values)
        except ConfigurationError as error:
            reader.problems.append(str(error))


def _parse_trust(name: str, values: dict[str, Any]) -> None:
    from tensorserve.bundle.signature_trust import TrustedCertificates, TrustedKeys

    if name == "signature_key":
        TrustedKeys.parse(values[name])
    elif name == "signature_certificates":
        TrustedCertificates.parse(values[name])
    else:
        from tensorserve.bundle.sigstore_trust import TrustedIdentity

        TrustedIdentity.parse(*(values[name] for name in _IDENTITY))
