"""docs/troubleshooting.md quotes messages that the package prints, and knows every exit code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


@cache
def printed() -> str:
    """All texts of the package, one a line; a gap stands for what a message fills in."""
    texts = []
    for file in sorted((ROOT / "entrypoint" / "tensorserve").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def quoted() -> list[str]:
    """The pieces of the messages in the page's tables, without what is filled in."""
    messages = []
    sections = r"^## (?:Messages |`/readyz`).*?(?=^## )"
    for section in re.findall(sections, PAGE, re.MULTILINE | re.DOTALL):
        for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE):
            messages += re.findall(r"``(.+?)``|`([^`]+)`", row)
    whole = [(first or second).strip() for first, second in messages]
    return [piece.strip() for message in whole for piece in message.split("…") if piece.strip()]


def test_every_quoted_message_is_in_the_package() -> None:
    """Reworded messages are reworded here, too."""
    pieces = quoted()
    assert len(pieces) > 80
    assert [piece for piece in pieces if piece not in printed()] == []


def test_every_exit_code_has_a_row() -> None:
    """Those of docs/exit-codes.md."""
    codes = re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
    assert len(codes) >= 9
    section = PAGE.partition("## By exit code")[2].partition("\n## ")[0]
    known = re.findall(r"\d+", " ".join(re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)))
    assert set(codes) - set(known) == set()


def test_every_reason_for_a_retry_is_explained() -> None:
    """Those that the sources and the loader count: in docs/metrics.md and docs/alerts.md."""
    reasons = set()
    for file in sorted((ROOT / "entrypoint" / "tensorserve").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else ""
            called = node.func.attr if isinstance(node.func, ast.Attribute) else called
            reason = node.args[0]
            if called in {"TryAgain", "retry"} and isinstance(reason, ast.Constant):
                reasons.add(reason.value)
    assert len(reasons) > 10
    for page in ("metrics.md", "alerts.md"):
        text = (ROOT / "docs" / page).read_text()
        assert [reason for reason in sorted(reasons) if f"`{reason}`" not in text] == []
