"""What the control group says of memory, in both versions and where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.memory_group import MemoryGroup, available_bytes, memory_group


def group(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / f"memory.{name}").write_text(text)
    return root


@pytest.mark.parametrize("below", ["", "own/group"])
def test_version_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """In a container its own group is the root; elsewhere /proc says where it is."""
    own = tmp_path / "cgroup"
    own.write_text(f"0::/{below}\n")
    monkeypatch.setattr("tensorserve.memory_group._OWN", own)
    events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
    group(
        tmp_path / "fs" / below,
        max="1000\n",
        current="990\n",
        peak="999\n",
        events=events,
        stat="anon 5\ninactive_file 600\n",
    )
    assert memory_group(tmp_path / "fs") == MemoryGroup(1000, 990, 600, 999, 2)


def test_version_1_is_read(tmp_path: Path) -> None:
    """Older hosts."""
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
    group(tmp_path / "memory", limit_in_bytes="1000", usage_in_bytes="7", oom_control=control)
    assert memory_group(tmp_path) == MemoryGroup(1000, 7, None, None, 5)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "x", ""])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    """Each version has its own way to say so."""
    assert memory_group(group(tmp_path, max=limit, current="5")) == MemoryGroup(None, 5)


def test_pages_of_files_that_nobody_uses_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that has read its weights from a disk has "used" all of its memory."""
    group(tmp_path, max="1000", current="990", stat="inactive_file 600\n")
    monkeypatch.setattr("tensorserve.memory_group.CGROUPS", tmp_path)
    assert available_bytes() == 610


def test_without_control_groups_nothing_is_known(tmp_path: Path) -> None:
    """The machine's own figure is left."""
    assert memory_group(tmp_path) == MemoryGroup()
    available = available_bytes()
    assert available is None or available > 0
