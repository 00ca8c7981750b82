"""Which of a manifest's wrapped keys is tried, in which order, and what is said if none helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError, TensorserveError, WrongKeyError
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Binding, Reference, Services, WrappedKey, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping
from tensorserve.wrapping.unwrap import Unwrapped, unwrap_key

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))


def entry(path: Path, key: bytes = MODEL_KEY, binding: Binding = BINDING) -> WrappedKey:
    """`key` wrapped with the wrapping key at `path`, which is made."""
    if not path.exists():
        path.write_bytes(path.name.encode().ljust(32, b"."))
    by = for_wrapping(f"file:{path}", Services())
    return WrappedKey(by.kind, by.key, by.wrap(Secret(key), binding))


def unwrapped(entries: list[WrappedKey], uri: str | None) -> Unwrapped:
    reference = None if uri is None else Reference.parse(uri, "the test")
    return unwrap_key(entries, BINDING, reference, Services(), "manifest.json")


def test_the_recipient_of_the_reference_is_taken(tmp_path: Path) -> None:
    """Others are passed over, also kinds that only a later release knows."""
    entries = [
        WrappedKey("later", "x", "y"),
        entry(tmp_path / "a"),
        entry(tmp_path / "b"),
    ]
    for name in "ab":
        found = unwrapped(entries, f"file:{tmp_path / name}")
        assert found.key.reveal() == MODEL_KEY
        assert found.by == found.key.origin
        assert str(tmp_path / name) in found.by
        assert found.proves_sender


def test_who_is_no_recipient_is_told_who_is(tmp_path: Path) -> None:
    """65: it is the wrong key."""
    one = entry(tmp_path / "a")
    entry(tmp_path / "b")
    with pytest.raises(WrongKeyError, match=f"recipients in manifest.json are file:{one.key}"):
        unwrapped([one], f"file:{tmp_path / 'b'}")


def test_a_file_is_never_named_by_the_manifest(tmp_path: Path) -> None:
    """Without a reference nothing on this machine is opened."""
    with pytest.raises(ConfigurationError, match="none of these can be asked") as caught:
        unwrapped([entry(tmp_path / "a"), WrappedKey("file", "/etc/passwd", "x")], None)
    assert "TENSORSERVE_KEY_URI" in str(caught.value.hint)


def test_what_does_not_unwrap_is_passed_over(tmp_path: Path) -> None:
    """A damaged entry first, a good one behind it; in the order of the manifest."""
    good = entry(tmp_path / "a")
    damaged = WrappedKey(good.provider, good.key, "AAAA")
    reference = f"file:{tmp_path / 'a'}"
    assert unwrapped([damaged, good], reference).key.reveal() == MODEL_KEY
    with pytest.raises(WrongKeyError) as caught:
        unwrapped([damaged, damaged], reference)
    assert "Tried in this order" in caught.value.__notes__[0]


@pytest.mark.parametrize("key", [bytes(32), b"short", b""], ids=["another", "short", "empty"])
def test_a_key_of_another_fingerprint_is_no_key(tmp_path: Path, key: bytes) -> None:
    """Whatever a provider gives, the manifest's fingerprint must be the key's."""
    with pytest.raises(TensorserveError) as caught:
        unwrapped([entry(tmp_path / "a", key)], f"file:{tmp_path / 'a'}")
    assert caught.value.exit_code == 65
