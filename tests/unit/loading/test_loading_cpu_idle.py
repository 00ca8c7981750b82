"""How much of the processors' time is to spare, from the kernel's own counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.loading.cpu_idle import CpuIdle

BEFORE = """cpu  900 0 900 9000 0 0 0 0 0 0
cpu0 100 0 100 1000 0 0 0 0 0 0
cpu1 100 0 100 1000 50 0 0 0 0 0
cpu11 0 0 0 7000 0 0 0 0 0 0
intr 1 2 3
"""
AFTER = """cpu  900 0 900 9000 0 0 0 0 0 0
cpu0 160 0 120 1010 0 5 5 0 60 0
cpu1 140 0 120 1020 60 5 5 0 0 0
cpu11 0 0 0 9999 0 0 0 0 0 0
"""


def test_only_the_processors_that_were_named_count(tmp_path: Path) -> None:
    """40 of 200 ticks were idle or waited for a disk."""
    stat = tmp_path / "stat"
    stat.write_text(BEFORE)
    spare = CpuIdle({0, 1}, stat)
    spare()
    stat.write_text(AFTER)
    assert spare() == pytest.approx(40 / 200)
    assert spare() == 1, "no tick since"


@pytest.mark.parametrize("text", [None, "", "cpu0 a b\n", "nonsense\n"])
def test_where_nothing_is_known_there_is_time(tmp_path: Path, text: str | None) -> None:
    """A sandbox may hide it."""
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert CpuIdle({0}, tmp_path / "stat")() == 1


def test_this_machine_says_something() -> None:
    """The real file."""
    assert 0 <= CpuIdle({0})() <= 1
