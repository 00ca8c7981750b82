"""Makes the site of docs/ in build/site: gathers the pages, runs the generator, checks the result.

Pages link as GitHub wants it: `../CHANGELOG.md`, and in README.md `docs/metrics.md`. A generator
takes one folder. So the pages are copied to build/site-source; files outside docs/ that a page
links to come along below `project/`, and the links are changed to match. Run by `make site`.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, SITE = ROOT / "build/site-source", ROOT / "build/site"
DOCS, PROJECT = "docs", "project"
# Pages outside docs/ that the navigation of mkdocs.yml names.
PAGES = ("README.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")
# A link's target and its anchor.
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
# What a browser fetches from another server when it shows a page.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))"""
    r"""[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|@import\s+["'](?:https?:)?//|url\(["']?(?:https?:)?//""",
    re.IGNORECASE,
)


def gather() -> None:
    """Fill build/site-source anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        ROOT / DOCS, SOURCE, ignore=shutil.ignore_patterns("*.py", "sbom", "__pycache__")
    )
    pages = [*PAGES, *(f"{DOCS}/{page.name}" for page in sorted((ROOT / DOCS).glob("*.md")))]
    outside = set(PAGES)
    for page in pages:
        text = (ROOT / page).read_text()
        for _, target, _ in _LINK.findall(text):
            path = in_project(page, target)
            if path is not None and not path.startswith(f"{DOCS}/") and (ROOT / path).is_file():
                outside.add(path)
    for path in sorted(outside):
        (SOURCE / PROJECT / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, SOURCE / PROJECT / path)
    for page in pages:
        (SOURCE / on_site(page)).write_text(with_site_links(page, (ROOT / page).read_text()))


def with_site_links(page: str, text: str) -> str:
    """`text` of `page` (a path from the project's root) with the links as the site needs them."""
    here = posixpath.dirname(on_site(page)) or "."

    def changed(found: re.Match[str]) -> str:
        path = in_project(page, found[2])
        if path is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(on_site(path), here)}{found[3]}"

    return _LINK.sub(changed, text)


def in_project(page: str, target: str) -> str | None:
    """The path from the project's root that `target` means in `page`; None for a URL."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def on_site(path: str) -> str:
    """Where a file of the project stands in build/site-source."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else f"{PROJECT}/{path}"


def loaded_from_elsewhere() -> list[str]:
    """What the built pages would load from another server."""
    return [
        f"{file.relative_to(SITE)}: {found[0]}"
        for file in sorted(SITE.rglob("*"))
        if file.suffix in {".html", ".css"} and (found := _LOADED.search(file.read_text()))
    ]


def main() -> int:
    """Build the site; warnings, dead links among them, are errors."""
    gather()
    mkdocs = Path(sys.executable).with_name("mkdocs")
    command = [
        str(mkdocs),
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    # Material prints a notice about its successor at each build: docs/dependencies.md says it once.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code:
        return code
    foreign = loaded_from_elsewhere()
    for line in foreign:
        print(f"loads from another server: {line}", file=sys.stderr)
    return bool(foreign)


if __name__ == "__main__":
    sys.exit(main())
