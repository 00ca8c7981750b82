"""Every link in README.md and docs/ leads to a file and a heading that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} (.+)$", _FENCED.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in plain]


def problem(page: Path, target: str) -> str | None:
    """What is wrong with a link in `page`; None where it resolves or leads to another host."""
    if "://" in target or target.startswith("mailto:"):
        return None
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.is_relative_to(ROOT):
        return "leaves the project"
    if not file.is_file():
        return "no such file"
    if anchor and anchor not in anchors(file.read_text()):
        return "no such heading"
    return None


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    """Each kind of mistake, and the links that are right."""
    page = ROOT / "docs" / "exit-codes.md"
    assert problem(page, "no-such-page.md") == "no such file"
    assert problem(page, "metrics.md#no-such-heading") == "no such heading"
    assert problem(page, "#no-such-heading") == "no such heading"
    assert problem(page, "../tests") == "no such file"  # GitHub shows a folder, the site cannot
    assert problem(page, f"../../{tmp_path.name}/x.md") == "leaves the project"
    assert problem(page, "metrics.md#the-event-log") is None
    assert problem(page, "#exit-codes") is None
    assert problem(page, "../CHANGELOG.md") is None
    assert problem(page, "https://example.com/no-such-page.md") is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page: Path) -> None:
    """Files and headings."""
    links = _LINK.findall(_FENCED.sub("", page.read_text()))
    dead = {target: why for target in links if (why := problem(page, target)) is not None}
    assert dead == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_two_headings_share_an_anchor(page: Path) -> None:
    """GitHub and the site number the second one differently, so a link fits one of them."""
    found = anchors(page.read_text())
    assert sorted(found) == sorted(set(found))


def test_the_site_shows_every_page() -> None:
    """mkdocs.yml's navigation names each page of docs/ once."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].partition("theme:")[0]
    named = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    here = {page.name for page in PAGES if page.parent == ROOT / "docs"}
    assert sorted(name for name in named if not name.startswith("project/")) == sorted(here)
