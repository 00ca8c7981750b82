"""A wrapping key in a file: only it unwraps, and only for the bundle that it was wrapped for."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError, WrongKeyError
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Binding, Provider, Services, WrappedKey, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))


def provider(directory: Path, name: str = "k", content: bytes = bytes(range(9, 41))) -> Provider:
    path = directory / name
    path.write_bytes(content)
    return for_wrapping(f"file:{path}", Services())


def wrapped(by: Provider, binding: Binding = BINDING) -> WrappedKey:
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def test_what_it_wraps_it_unwraps(tmp_path: Path) -> None:
    """In any of the forms that a key's file has; each time the wrapped key is another text."""
    first = provider(tmp_path)
    for content in (bytes(range(9, 41)), bytes(range(9, 41)).hex().encode() + b"\n"):
        again = provider(tmp_path, "other", content)
        assert again.key == first.key
        assert again.unwrap(wrapped(first), BINDING) == MODEL_KEY
    assert wrapped(first).wrapped != wrapped(first).wrapped


def test_a_wrapped_key_is_bound_to_its_bundle(tmp_path: Path) -> None:
    """To the manifest's salt, and to the model's key by its fingerprint."""
    by = provider(tmp_path)
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="for another bundle"):
            by.unwrap(wrapped(by), other)


def test_another_wrapping_key_and_damage_are_refused(tmp_path: Path) -> None:
    """Each byte of it counts; what is no base64, or is cut off, is no traceback."""
    by = provider(tmp_path)
    entry = wrapped(by)
    with pytest.raises(WrongKeyError, match="does not unwrap"):
        provider(tmp_path, "other", bytes(32)).unwrap(entry, BINDING)
    box = base64.b64decode(entry.wrapped)
    for at in range(len(box)):
        changed = bytearray(box)
        changed[at] ^= 1
        damaged = replace(entry, wrapped=base64.b64encode(changed).decode())
        with pytest.raises(WrongKeyError):
            by.unwrap(damaged, BINDING)
    for text in ("", "A", "AAAA", "!", entry.wrapped[:-8]):
        with pytest.raises(WrongKeyError):
            by.unwrap(replace(entry, wrapped=text), BINDING)


def test_neither_key_is_shown(tmp_path: Path) -> None:
    """The wrapping key is named by a fingerprint; nothing prints a key or what is wrapped."""
    by = provider(tmp_path)
    entry = wrapped(by)
    for text in (repr(entry), str(entry), by.describe(), repr(by)):
        assert entry.wrapped not in text
        assert bytes(range(9, 41)).hex() not in text
    assert by.key != fingerprint_of(bytes(range(9, 41)))[:16]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"short", "is not 32 bytes"), (b"", "is not 32 bytes"), (bytes(70_000), "larger than")],
)
def test_a_file_that_is_no_key_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    """With the path, and never with what is in it."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        provider(tmp_path, content=content)
    assert str(tmp_path) in str(caught.value)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file:relative", "not an absolute path"),
        ("file:/no/such/file", "No such file"),
        ("file:/nul\0", "no file has such a name"),
        ("file://host/key", "a file of this machine"),
        ("files:/x", "not a kind of wrapping key"),
        ("/run/secrets/key", "does not begin with the kind"),
        ("FILE:/x", "does not begin with the kind"),
    ],
)
def test_a_wrong_reference_is_explained(text: str, said: str) -> None:
    """What it is, and an example."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        for_wrapping(text, Services())
    assert caught.value.hint
