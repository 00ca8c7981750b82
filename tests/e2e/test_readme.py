"""The README's commands do what it says, as they stand there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import CPU_ENVIRONMENT, Tensorserve, clean_environment
from s3server import S3Server

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    """The indented blocks of a page, as a reader copies them."""
    text = (ROOT / page).read_text()
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


def block_with(page: str, words: str) -> str:
    """The one block of `page` that has `words` in it."""
    (found,) = [block for block in blocks(page) if words in block]
    return found


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3Server]:
    """One of its own: other pages pack to the same bucket and name."""
    with S3Server(tmp_path / "s3") as server:
        server.make_bucket("my-bucket")
        yield server


def test_use_it(
    tmp_path: Path, model_dir: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pack into a bucket with a fresh key, plan, check, serve: word for word."""
    (tmp_path / "my-model").symlink_to(model_dir)
    environment = clean_environment() | CPU_ENVIRONMENT | s3.environment
    environment["TENSORSERVE_STATE_DIR"] = str(tmp_path / "state")
    serve = block_with("README.md", "tensorserve up        #")
    script = block_with("README.md", "tensorserve pack ./my-model")
    script += serve.replace("tensorserve up ", "true ")
    done = subprocess.run(
        ["bash", "-euxc", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything that a start needs is there." in done.stdout
    assert (tmp_path / "model.key").stat().st_mode & 0o777 == 0o600
    exported = dict(re.findall(r"^export (\w+)=(\S+)$", serve, re.MULTILINE))
    monkeypatch.chdir(tmp_path)  # the README's paths are relative
    with Tensorserve(tmp_path, s3.environment | exported) as engine:
        engine.wait_ready()
        assert engine.get("/metrics", engine.metrics_port)[0] == 200
        assert engine.get("/", engine.metrics_port)[0] == 200


def test_every_target_that_is_named_exists() -> None:
    """`make X` in a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {
        (page.name, target)
        for page in pages
        for target in re.findall(r"(?:`|^    )make ([a-z0-9-]+)", page.read_text(), re.MULTILINE)
    }
    assert len(named) > 10
    assert {(page, target) for page, target in named if target not in targets} == set()


def test_every_link_between_pages_leads_somewhere() -> None:
    """Files and headings."""
    dead = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name) if name else page
            if not file.exists() or (heading and heading not in _anchors(file.read_text())):
                dead.append((page.name, target))
    assert dead == []


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
