"""A manifest's keys: what they are made of, what the MAC covers, what is sealed."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tensorserve.bundle import keys as keys_module
from tensorserve.bundle.keys import GivenKey, parse_passphrase
from tensorserve.bundle.manifest import parse_manifest
from tensorserve.bundle.manifest_mac import ManifestKeys, Parameters, mac_input
from tensorserve.crypto.hkdf import hkdf_sha256
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format import PasswordHash, TagMismatchError
from tensorserve.secret import Secret

KEY = GivenKey(bytes(range(32)), "the test")
SALT = bytes(range(32))
CHEAP = PasswordHash(passes=1, memory=8192, salt=bytes(16))


def keys() -> ManifestKeys:
    return Parameters(SALT, None).keys(KEY, "the manifest")


def document() -> dict[str, Any]:
    return {"a": 1, "b": {"c": ["é", "\ud800"]}, "authentication": {"salt": SALT.hex()}}


def test_each_use_has_a_key_of_its_own() -> None:
    """None of them is the model's; each is as the documentation says."""
    made = keys()
    infos = (b"tensorserve manifest v2 mac", b"tensorserve manifest v2 digests")
    expected = [hkdf_sha256(KEY.reveal(), salt=SALT, info=info) for info in infos]
    assert [made._mac, made._digests] == expected
    assert len({*expected, KEY.reveal()}) == 3


def test_the_mac_is_that_of_the_documentation() -> None:
    """Computed here by other means."""
    import hashlib
    import hmac

    text = (
        '{"a":1,"authentication":{"salt":"' + SALT.hex() + '"},"b":{"c":["\\u00e9","\\ud800"]}}'
    ).encode()
    assert mac_input(document()) == text
    key = hkdf_sha256(KEY.reveal(), salt=SALT, info=b"tensorserve manifest v2 mac")
    assert keys().mac(document()) == hmac.new(key, text, hashlib.sha256).hexdigest()


def test_the_mac_itself_is_not_covered_and_all_else_is() -> None:
    """The order of members is no content; a number is not its text."""
    right = keys().mac(document())
    signed = document()
    signed["authentication"]["mac"] = right
    assert keys().fits(signed)
    turned = dict(reversed(signed.items()))
    assert keys().fits(turned)
    for change in ({"a": 2}, {"a": "1"}, {"a": True}, {"d": None}, {"b": {"c": []}}):
        assert not keys().fits(signed | change)
    for bad in ("", "0" * 63, "0" * 64 + " ", "g" * 64, None, 0):
        signed["authentication"]["mac"] = bad
        with pytest.raises(ValueError, match=r"mac|digit"):
            keys().fits(signed)


def test_digests_come_out_as_they_went_in() -> None:
    """Sealed anew each time; another key's and a cut one are noticed."""
    digests = tuple(os.urandom(32) for _ in range(5))
    sealed = keys().seal_digests(digests)
    assert keys().open_digests(sealed) == digests
    assert keys().seal_digests(digests) != sealed
    other = Parameters(bytes(32), None).keys(KEY, "another manifest")
    with pytest.raises(TagMismatchError):
        other.open_digests(sealed)
    for bad in ("", "x", sealed[:40], sealed + "AAAA"):
        with pytest.raises(ValueError, match="digests"):
            keys().open_digests(bad)


def test_no_digests_are_none() -> None:
    """Of a file without tensors, say."""
    assert keys().open_digests(keys().seal_digests(())) == ()


def test_a_passphrase_is_derived_once_for_files_and_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a second and 256 MiB each time else."""
    derived = []
    derive = keys_module.derive_key

    def counted(*arguments: Any, **named: Any) -> bytes:
        derived.append(named)
        return derive(*arguments, **named)

    monkeypatch.setattr(keys_module, "derive_key", counted)
    passphrase = parse_passphrase(Secret("correct horse", "the test"))
    one = passphrase.for_parameters(CHEAP, "a file")
    Parameters(SALT, CHEAP).keys(passphrase, "the manifest")
    assert len(derived) == 1
    assert GivenKey(one, "derived").for_parameters(CHEAP, "a file") == one


@pytest.mark.parametrize(
    ("stated", "error"),
    [
        ({"passes": 1, "memory": 2**50, "salt": "00" * 16}, CorruptError),
        ({"passes": 2**60, "memory": 8192, "salt": "00" * 16}, CorruptError),
        ({"passes": 1, "memory": 8192, "salt": "00" * 15}, CorruptError),
        ({"passes": True, "memory": 8192, "salt": "00" * 16}, CorruptError),
        ({"passes": -1, "memory": 8192, "salt": "00" * 16}, CorruptError),
        ({"passes": "1", "memory": 8192, "salt": "00" * 16}, CorruptError),
        ([], CorruptError),
        (None, WrongKeyError),
    ],
)
def test_parameters_of_a_forger_are_bounded(stated: object, error: type[Exception]) -> None:
    """They are read before the MAC: they may cost little, and end as damage does."""
    authentication = {
        "scheme": "hkdf-sha256, hmac-sha256",
        "salt": "00" * 32,
        "passphrase": stated,
        "mac": "00" * 32,
    }
    manifest = {
        "format": "tensorserve-bundle",
        "version": 2,
        "encryption": {},
        "authentication": authentication,
    }
    passphrase = parse_passphrase(Secret("correct horse", "the test"))
    with pytest.raises(error) as caught:
        parse_manifest(json.dumps(manifest).encode(), "manifest.json", passphrase)
    assert not isinstance(caught.value, ConfigurationError)


def test_nothing_of_a_manifest_is_believed_before_its_mac() -> None:
    """What is wrong behind it is not even looked at."""
    manifest = {
        "format": "tensorserve-bundle",
        "version": 2,
        "layout": "of the future",
        "files": "no list",
        "encryption": {},
        "authentication": Parameters(SALT, None).to_json() | {"mac": "00" * 32},
    }
    with pytest.raises(CorruptError, match="The MAC of"):
        parse_manifest(json.dumps(manifest).encode(), "manifest.json", KEY)
