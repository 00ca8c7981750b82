"""docs/architecture.md names files and rooms that are there, and its walks go one way."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "entrypoint" / "tensorserve"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
_FILE = re.compile(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|c))`")


def walks() -> list[list[str]]:
    """The files of each walk, in order."""
    section = PAGE.partition("## Three walks")[2].partition("\n## ")[0]
    tables = section.split("| file |")[1:]
    return [_FILE.findall(" ".join(re.findall(r"^\| (.+?) \|", t, re.MULTILINE))) for t in tables]


def test_there_are_three_walks() -> None:
    """URI to first byte, key to decryption, range to parameter."""
    assert [len(walk) > 8 for walk in walks()] == [True] * 3


@pytest.mark.parametrize("walk", walks(), ids=lambda walk: walk[0])
def test_a_walk_visits_no_file_twice(walk: list[str]) -> None:
    """And each of them is there."""
    assert sorted(walk) == sorted(set(walk))
    assert [name for name in walk if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize("page", ["architecture.md", "loader.md", "dependencies.md"])
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    """Of the package, where it is named with its room."""
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    named = _FILE.findall((ROOT / "docs" / page).read_text())
    inside = [name for name in named if name.partition("/")[0] in rooms]
    assert len(inside) > 1
    assert [name for name in inside if not (PACKAGE / name).is_file()] == []


def test_the_contracts_of_imports_are_those_of_the_linter() -> None:
    """The names in pyproject.toml, and every room in its order."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for contract in linter["contracts"]:
        assert f"    {contract['name']} KEPT" in PAGE
    layers = [layer.removeprefix("tensorserve.") for layer in linter["contracts"][0]["layers"]]
    rooms = [layer for layer in layers if "|" not in layer]
    table = PAGE.partition("| room |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([a-z]+)/` \|", table, re.MULTILINE) == rooms
