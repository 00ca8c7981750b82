"""Test names fit a line of pytest's output: at most 60 characters."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
LONGEST = 60


def test_no_name_of_a_test_is_too_long() -> None:
    """The docstring has room for the rest."""
    names = [
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    assert len(names) > 1000
    assert [name for name in names if len(name) > LONGEST] == []
