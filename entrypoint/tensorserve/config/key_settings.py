"""Which keys and signatures are asked for, and do they fit together?"""

from __future__ import annotations

from typing import Any

from tensorserve.config.variable_reader import VariableReader
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret


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
    from tensorserve.bundle.signature_trust import TrustedCertificates, TrustedKeys

    kinds: dict[str, type[TrustedKeys | TrustedCertificates]] = {
        "signature_key": TrustedKeys,
        "signature_certificates": TrustedCertificates,
    }
    given = {name: values[name] for name in kinds if values[name] is not None}
    if len(given) > 1:
        reader.problem(
            "Both TENSORSERVE_SIGNATURE_KEY and TENSORSERVE_SIGNATURE_CERTIFICATES are set: a "
            "bundle has one signature.",
            "Set one of them. The first may hold several keys.",
        )
    for name, secret in given.items():
        try:
            kinds[name].parse(secret)
        except ConfigurationError as error:
            reader.problems.append(str(error))
