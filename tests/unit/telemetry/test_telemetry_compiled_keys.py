"""Keys of vLLM's own compiled models, by the folders that it makes."""

from __future__ import annotations

from pathlib import Path

from tensorserve.telemetry.compiled_keys import compiled_keys


def test_keys_of_both_ways_to_compile(tmp_path: Path) -> None:
    """At start and ahead of time; the folder of the latter is no key."""
    for name in ("0123456789", "torch_aot_compile/abc", "torch_aot_compile/def"):
        (tmp_path / "torch_compile_cache" / name).mkdir(parents=True)
    assert compiled_keys(tmp_path) == {"0123456789", "abc", "def"}


def test_none_where_nothing_was_compiled(tmp_path: Path) -> None:
    """Or the folder cannot be read."""
    assert compiled_keys(tmp_path) == frozenset()
    assert compiled_keys(tmp_path / "missing") == frozenset()
