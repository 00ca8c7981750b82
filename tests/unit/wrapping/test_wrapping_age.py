"""age: the packing machine has the public half alone; identities are read from a file."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pyrage
import pytest

from tensorserve.config.settings import SourceSettings
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, WrongKeyError
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Binding, Reference, Services, WrappedKey, fingerprint_of
from tensorserve.wrapping.providers import for_unwrapping, for_wrapping
from tensorserve.wrapping.unwrap import unwrap_key

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))


def identity(path: Path, count: int = 1) -> list[str]:
    """A file as age-keygen writes it, with `count` identities; gives their recipients."""
    made = [pyrage.x25519.Identity.generate() for _ in range(count)]
    lines = [f"# public key: {one.to_public()}\n{one}" for one in made]
    path.write_text("# created: 2026-01-01\n" + "\n".join(lines) + "\n")
    return [str(one.to_public()) for one in made]


def entry(recipient: str, binding: Binding = BINDING) -> WrappedKey:
    by = for_wrapping(f"age:{recipient}", Services())
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def unwrapped(path: Path, *entries: WrappedKey, binding: Binding = BINDING) -> bytes:
    reference = Reference.parse(f"age:{path}", "the test")
    found = unwrap_key(entries, binding, reference, Services(), "manifest.json")
    assert not found.proves_sender
    return found.key.reveal()


def test_what_is_wrapped_for_a_recipient_its_identity_unwraps(tmp_path: Path) -> None:
    """Any identity of the file, and any of several recipients."""
    first, second = identity(tmp_path / "i", 2)
    (other,) = identity(tmp_path / "other")
    for recipient in (first, second):
        assert unwrapped(tmp_path / "i", entry(other), entry(recipient)) == MODEL_KEY
    assert unwrapped(tmp_path / "other", entry(other), entry(first)) == MODEL_KEY
    with pytest.raises(WrongKeyError, match="not wrapped for age:"):
        unwrapped(tmp_path / "other", entry(first))


def test_it_is_bound_to_its_bundle(tmp_path: Path) -> None:
    """age binds nothing; the binding is sealed with the key."""
    (recipient,) = identity(tmp_path / "i")
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="another bundle"):
            unwrapped(tmp_path / "i", entry(recipient, other))


def test_damage_is_refused(tmp_path: Path) -> None:
    """Cut off, changed, no age file, no base64, and one with another content."""
    (recipient,) = identity(tmp_path / "i")
    good = entry(recipient)
    box = base64.b64decode(good.wrapped)
    parsed = pyrage.x25519.Recipient.from_str(recipient)
    boxes = [box[:-1], box[:20], bytes(40), box[:-5] + bytes(5)]
    boxes += [pyrage.encrypt(b"", [parsed]), pyrage.encrypt(bytes(64), [parsed])]
    texts = ["!", *(base64.b64encode(one).decode() for one in boxes)]
    for text in texts:
        with pytest.raises(WrongKeyError):
            unwrapped(tmp_path / "i", replace(good, wrapped=text))


def test_a_recipient_can_be_named_by_its_identity(tmp_path: Path) -> None:
    """--wrap age:/path, where the file is at hand."""
    (recipient,) = identity(tmp_path / "i")
    assert for_wrapping(f"age:{tmp_path / 'i'}", Services()).key == recipient


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("age1" + "q" * 58, "has no line that begins with AGE-SECRET-KEY-1"),
        ("AGE-SECRET-KEY-1QQQQ", "has a line that is no X25519 identity"),
        ("AGE-PLUGIN-YUBIKEY-1QQQQ", "has no line"),
        ("", "has no line"),
    ],
)
def test_a_file_without_an_identity_is_named(tmp_path: Path, content: str, said: str) -> None:
    """Never with what is in it."""
    path = tmp_path / "i"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=said) as caught:
        for_unwrapping(Reference.parse(f"age:{path}", "the test"), Services())
    assert str(path) in str(caught.value)
    assert "QQQQ" not in str(caught.value)


@pytest.mark.parametrize(
    "recipient", ["age1", "age1" + "b" * 58, "ssh-ed25519 AAAA", "age1" + "q" * 58, "//host/x"]
)
def test_what_is_no_recipient_is_refused(recipient: str) -> None:
    """With how to find it."""
    with pytest.raises(ConfigurationError, match="is not an age recipient"):
        for_wrapping(f"age:{recipient}", Services())


def test_a_public_key_unwraps_nothing(tmp_path: Path) -> None:
    """Mistaken for the identity: the message says what is wanted."""
    (recipient,) = identity(tmp_path / "i")
    with pytest.raises(ConfigurationError, match="does not name the file of an age identity"):
        for_unwrapping(Reference.parse(f"age:{recipient}", "the test"), Services())
    with pytest.raises(ConfigurationError, match="does not name the file of an age identity"):
        for_wrapping(f"age:{recipient}", Services()).unwrap(entry(recipient), BINDING)


def test_a_start_needs_the_fingerprint_or_a_pin(tmp_path: Path) -> None:
    """78 without: anybody can wrap a key of his own for a public key."""
    from hf_samples import ACCESS, make_model

    (recipient,) = identity(tmp_path / "i")
    by = for_wrapping(f"age:{recipient}", Services())
    bundle = str(tmp_path / "b")
    key = Secret(MODEL_KEY, "the test")
    done = pack(make_model(tmp_path / "hf"), bundle, access=ACCESS, key=key, recipients=(by,))
    given = {"TENSORSERVE_KEY_URI": f"age:{tmp_path / 'i'}"}
    with pytest.raises(ConfigurationError, match="anybody can wrap"):
        with_key(SourceSettings.from_environment(given), bundle)
    for more in (
        {"TENSORSERVE_KEY_FINGERPRINT": str(done.key_fingerprint)},
        {"TENSORSERVE_MANIFEST_SHA256": done.manifest_sha256},
    ):
        found = with_key(SourceSettings.from_environment(given | more), bundle).key
        assert found is not None
        assert found.reveal() == MODEL_KEY
