"""Attack: a manifest of version 1, which needs no MAC, takes the place of the one that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from forging import downgrade, rewrite
from starting import refused
from victims import Store


def test_to_version_1(tmp_path: Path, bundle: Path, store: Store) -> None:
    """It counts as none: the weights would have to say themselves what they are."""
    rewrite(bundle, downgrade)
    assert "neither an authenticated manifest" in refused(tmp_path, store.put(bundle))


@pytest.mark.parametrize("wish", ["auto", "hashes"])
def test_version_2_without_a_mac(tmp_path: Path, bundle: Path, store: Store, wish: str) -> None:
    """There is no such thing for an encrypted bundle."""
    rewrite(bundle, lambda document: document.update(authentication=None))
    said = refused(tmp_path, store.put(bundle) | {"TENSORSERVE_VERIFY": wish})
    assert "an encrypted bundle has a MAC" in said


def test_version_2_of_a_plain_bundle(tmp_path: Path, bundle: Path, store: Store) -> None:
    """It says that nothing is encrypted; the weights are."""

    def plain(document: dict[str, object]) -> None:
        document.update(authentication=None, encryption=None)

    rewrite(bundle, plain)
    said = refused(tmp_path, store.put(bundle))
    assert "is encrypted, but the bundle's manifest.json says that it is not" in said
