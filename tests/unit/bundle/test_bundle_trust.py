"""How a file is authenticated, and what is compared: the whole table of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorserve.bundle.manifest import Manifest, TensorsEntry
from tensorserve.bundle.trust import MODES, WARNINGS, verification_of
from tensorserve.errors import ConfigurationError, CorruptError

NAME = "model.tensors"
ENTRY = TensorsEntry(1, 1, 1, "0" * 64, "0" * 64)
NOBODY = Manifest(files=(), tensors_files={NAME: ENTRY}, encryption=None)
VOUCHED = replace(NOBODY, authenticated_by="key")


@pytest.mark.parametrize(
    ("wish", "manifest", "encrypted", "mode", "digests"),
    [
        ("auto", VOUCHED, True, "manifest", False),
        ("hashes", VOUCHED, True, "manifest", True),
        ("tags", VOUCHED, True, "manifest", False),
        ("manifest", VOUCHED, True, "manifest", False),
        ("manifest", replace(NOBODY, authenticated_by="pin"), False, "manifest", True),
        ("auto", replace(NOBODY, authenticated_by="pin"), True, "manifest", False),
        ("auto", NOBODY, True, "digests", True),
        ("hashes", NOBODY, True, "digests", True),
        ("tags", NOBODY, True, "tags", False),
        ("auto", None, True, "digests", True),
        ("tags", None, True, "tags", False),
        ("auto", None, False, "none", False),
        ("hashes", None, False, "none", True),
        ("auto", NOBODY, False, "none", False),
        ("auto", replace(NOBODY, authenticated_by="pin"), False, "manifest", True),
        ("tags", replace(NOBODY, authenticated_by="pin"), False, "manifest", True),
    ],
)
def test_the_rule(
    wish: str, manifest: Manifest | None, encrypted: bool, mode: str, digests: bool
) -> None:
    """A plain file's data is bound by its digests alone; a sealed one's by its tags."""
    rule = verification_of(wish, manifest, NAME, encrypted=encrypted, pinned=True)
    assert (rule.mode, rule.digests) == (mode, digests)


@pytest.mark.parametrize(
    ("manifest", "name", "found"),
    [
        (None, NAME, "has none"),
        (NOBODY, NAME, "is not authenticated"),
        (VOUCHED, "other.tensors", "does not name it"),
    ],
)
def test_a_manifest_may_be_asked_for(manifest: Manifest | None, name: str, found: str) -> None:
    """Without one sealed weights are not what they should be; plain ones want a pin."""
    with pytest.raises(CorruptError, match=found) as sealed:
        verification_of("manifest", manifest, name, encrypted=True, pinned=True)
    assert "tensorserve sign" in str(sealed.value)
    with pytest.raises(ConfigurationError, match=found) as plain:
        verification_of("manifest", manifest, name, encrypted=False, pinned=True)
    assert "TENSORSERVE_MANIFEST_SHA256" in str(plain.value)


@pytest.mark.parametrize("wish", ["auto", "tags"])
def test_a_plain_file_without_a_version_is_held_to_its_digests(wish: str) -> None:
    """Two reads may be of two versions. A sealed file's tags say so by themselves."""
    assert verification_of(wish, NOBODY, NAME, encrypted=False, pinned=False).digests
    rule = verification_of("tags", NOBODY, NAME, encrypted=True, pinned=False)
    assert (rule.mode, rule.digests) == ("tags", False)


def test_a_manifest_vouches_for_what_it_names() -> None:
    """For another file beside it nothing does."""
    assert (
        verification_of("auto", VOUCHED, "other.tensors", encrypted=True, pinned=True).mode
        == "digests"
    )


def test_what_is_weaker_is_said_with_the_remedy() -> None:
    """Only for encrypted weights: nobody expects more of plain ones."""
    assert set(WARNINGS) == {"digests", "tags"} < set(MODES)
    assert all("tensorserve sign" in text for text in WARNINGS.values())
