"""Attack: of a sealed bundle one tensor is kept, whose plaintext is known, and all else is planted.

The manifest goes, so that each tensor's own SHA-256 has to do; whoever knows the plaintext has it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from forging import MANIFEST, known_plaintext
from starting import refused, start
from victims import Store

ONES = struct.pack("<16f", *[1.0] * 16)
MANIFEST_ONLY = {"TENSORSERVE_VERIFY": "manifest"}


@pytest.fixture
def forged(bundle: Path) -> Path:
    """With a configuration that nobody packed."""
    known_plaintext(bundle / "model.tensors", "model.norm.weight", ONES)
    (bundle / MANIFEST).unlink()
    (bundle / "chat_template.jinja").write_text("planted")
    return bundle


def test_only_a_manifest_will_do(tmp_path: Path, forged: Path, disk: Store) -> None:
    """The key's owner says that his bundles have one."""
    said = refused(tmp_path, disk.put(forged) | MANIFEST_ONLY)
    assert "TENSORSERVE_VERIFY=manifest requires an authenticated manifest.json" in said


def test_without_that_word_it_is_served(tmp_path: Path, forged: Path, disk: Store) -> None:
    """Second best is what the threat model says of it: the attack is a real one."""
    ended = start(tmp_path, disk.put(forged))
    assert (ended.code, ended.mode) == (None, "digests"), ended.text
    assert (ended.model_dir / "chat_template.jinja").read_text() == "planted"
    assert "no authenticated manifest" in ended.text


def test_a_bundle_as_it_was_packed_is_served(tmp_path: Path, bundle: Path, disk: Store) -> None:
    """There the word changes nothing."""
    ended = start(tmp_path, disk.put(bundle) | MANIFEST_ONLY)
    assert (ended.code, ended.mode) == (None, "manifest"), ended.text
