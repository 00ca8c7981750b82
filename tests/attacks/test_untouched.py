"""Nobody attacks: the same harness lets the bundle through to vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from starting import start
from victims import Store


@pytest.mark.parametrize("once", ["auto", "off"])
def test_a_bundle_as_it_was_packed_gets_as_far_as_vllm(
    tmp_path: Path, bundle: Path, store: Store, disk: Store, once: str
) -> None:
    """Else the tests beside this one would prove nothing."""
    for place in (store, disk):
        ended = start(tmp_path, place.put(bundle) | {"TENSORSERVE_IMPORT_ONCE": once})
        assert ended.code is None, ended.text
        assert ended.mode == "manifest"
        assert "warning" not in ended.text
