"""The table in README.md: every row is there, and every test that it names exists."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
ROWS = {
    cells[1].strip(): re.findall(r"`(\S+?)::(\S+?)`", cells[3])
    for line in (Path(__file__).parent / "README.md").read_text().splitlines()
    if re.match(r"\| F\d", line) and (cells := line.split("|"))
}


def named_in(path: Path) -> dict[str, str]:
    """{name: first line of its docstring} of a file's tests, without importing it."""
    found = re.findall(r'^def (test_\w+)\([^"]*?"""([^\n]*)', path.read_text(), re.MULTILINE)
    return dict(found)


def test_the_table_has_all_rows() -> None:
    """F1 to F18."""
    assert list(ROWS) == [f"F{number}" for number in range(1, 19)]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_names_tests_that_exist_and_say_so(row: str) -> None:
    """In their name or in their docstring."""
    assert ROWS[row]
    for file, pattern in ROWS[row]:
        found = {n: t for n, t in named_in(TESTS / file).items() if fnmatchcase(n, pattern)}
        assert found, f"{row}: {file}::{pattern}"
        if file.startswith("faults/"):
            for name, text in found.items():
                assert re.search(rf"\b{row}\b", text), f"{name} does not say {row}"
