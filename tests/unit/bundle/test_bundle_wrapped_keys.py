"""The member `wrapped_keys` of a manifest: bounded, bound to it, and no part of its content."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_samples import ACCESS, make_model
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import MANIFEST, Manifest, parse_manifest, read_manifest, rewrapped
from tensorserve.bundle.manifest_mac import UnknownMacError
from tensorserve.bundle.wrapped_keys import MOST_RECIPIENTS, WrappedKeys
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.wrapping.base import WrappedKey

KEY = GivenKey(bytes(range(32)), "the test")
ONE = {"provider": "vault", "key": "transit/models", "wrapped": "vault:v1:AAAA"}
WRAPPED = WrappedKeys("ab" * 32, (WrappedKey("vault", "transit/models", "vault:v1:AAAA"),))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A manifest without wrapped keys."""
    directory = tmp_path_factory.mktemp("packed")
    secret = Secret(KEY.reveal(), "the test")
    pack(make_model(directory / "hf"), str(directory / "b"), access=ACCESS, key=secret)
    return (directory / "b" / MANIFEST).read_bytes()


def test_a_manifest_without_recipients_is_as_before(data: bytes) -> None:
    """The field is not there; releases that do not know it see no difference."""
    assert "wrapped_keys" not in json.loads(data)
    assert parse_manifest(data, "m", KEY).wrapped_keys is None


def test_rewrapping_changes_the_recipients_and_the_mac_alone(data: bytes) -> None:
    """Salt, digests and what another release wrote stay."""
    before, made = json.loads(data), rewrapped(data, "m", KEY, WRAPPED)
    after = json.loads(made)
    assert after.pop("wrapped_keys") == {"fingerprint": "ab" * 32, "recipients": [ONE]}
    assert after["authentication"].pop("mac") != before["authentication"].pop("mac")
    assert after == before
    found = parse_manifest(made, "m", KEY)
    assert found.wrapped_keys == WRAPPED
    assert found.authenticated_by == "key"


def test_the_content_is_the_same_whoever_the_recipients_are(data: bytes) -> None:
    """Compiled code is bound to it."""
    plain = parse_manifest(data, "m", KEY)
    other = parse_manifest(rewrapped(data, "m", KEY, WRAPPED), "m", KEY)
    assert plain.sha256 != other.sha256
    assert plain.content_sha256 == other.content_sha256
    document = json.loads(data)
    document["made_by"] = {"x": "y"}
    assert parse_manifest(json.dumps(document).encode(), "m").content_sha256 != (
        plain.content_sha256
    )


def test_recipients_are_under_the_mac(data: bytes) -> None:
    """Who has the key sees whether somebody else changed them."""
    document = json.loads(rewrapped(data, "m", KEY, WRAPPED))
    document["wrapped_keys"]["recipients"][0]["key"] = "transit/other"
    with pytest.raises(UnknownMacError):
        parse_manifest(json.dumps(document).encode(), "m", KEY)


def test_a_manifest_of_another_key_is_not_rewrapped(data: bytes) -> None:
    """Nothing of it is believed before its MAC."""
    with pytest.raises(UnknownMacError):
        rewrapped(data, "m", GivenKey(bytes(32), "another"), WRAPPED)


def test_a_manifest_without_a_mac_has_no_key_to_wrap(tmp_path: Path) -> None:
    """Plain bundles, and version 1."""
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS)
    data = (tmp_path / "b" / MANIFEST).read_bytes()
    with pytest.raises(ConfigurationError, match="tensorserve sign"):
        rewrapped(data, "m", KEY, WRAPPED)
    document = json.loads(data) | {"wrapped_keys": WRAPPED.to_json()}
    with pytest.raises(CorruptError, match="a plain bundle has no wrapped_keys"):
        parse_manifest(json.dumps(document).encode(), "m")
    found = read_manifest(str(tmp_path / "b"), ACCESS, None)
    assert found is not None
    with pytest.raises(ValueError, match="salt of an encrypted"):
        Manifest((), {}, None, wrapped_keys=WRAPPED).to_json(None)


Change = Callable[[dict[str, Any]], object]
INVALID: dict[str, Change] = {
    "no object": lambda d: d.update(wrapped_keys=[ONE]),
    "nobody": lambda d: d["wrapped_keys"].update(recipients=[]),
    "too many": lambda d: d["wrapped_keys"].update(recipients=[ONE] * (MOST_RECIPIENTS + 1)),
    "no list": lambda d: d["wrapped_keys"].update(recipients={}),
    "no recipient": lambda d: d["wrapped_keys"].update(recipients=["vault"]),
    "no fingerprint": lambda d: d["wrapped_keys"].update(fingerprint="ab"),
    "no text": lambda d: d["wrapped_keys"]["recipients"][0].update(key=1),
    "a field less": lambda d: d["wrapped_keys"]["recipients"][0].pop("wrapped"),
    "too long": lambda d: d["wrapped_keys"]["recipients"][0].update(wrapped="A" * 8193),
    "a long name": lambda d: d["wrapped_keys"]["recipients"][0].update(key="A" * 513),
    "a control": lambda d: d["wrapped_keys"]["recipients"][0].update(key="a\x1b[2J"),
    "a line end": lambda d: d["wrapped_keys"]["recipients"][0].update(key="a\n"),
    "an odd kind": lambda d: d["wrapped_keys"]["recipients"][0].update(provider="../vault"),
    "a passphrase": lambda d: d["authentication"].update(
        passphrase={"passes": 1, "memory": 8192, "salt": "00" * 16}
    ),
}


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID)
def test_what_is_out_of_bounds_is_refused(data: bytes, change: Change) -> None:
    """Before any service is asked, and without the key."""
    document = json.loads(rewrapped(data, "m", KEY, WRAPPED))
    change(document)
    with pytest.raises(CorruptError, match="is not a manifest"):
        parse_manifest(json.dumps(document).encode(), "m")


def test_a_kind_of_a_later_release_is_kept(data: bytes) -> None:
    """It is somebody else's; rewrapping leaves it in."""
    wrapped = WrappedKeys("ab" * 32, (WrappedKey("later", "x", "y"),))
    assert parse_manifest(rewrapped(data, "m", KEY, wrapped), "m", KEY).wrapped_keys == wrapped
