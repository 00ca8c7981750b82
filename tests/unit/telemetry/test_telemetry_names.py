"""Does each name that may get into an event have words that a person can read?"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tensorserve
from tensorserve.bundle.trust import MODES, WARNINGS
from tensorserve.telemetry import PHASES, Check, Phase
from tensorserve.telemetry.names import (
    CAUTIONS,
    ENGINE_ENDED,
    FAILURES,
    PHASE_WORDS,
    RETRIES,
    STATUS_PREFIX,
)
from tensorserve.telemetry.wording import failed, retry_words

PACKAGE = Path(tensorserve.__file__).parent
DOCS = Path(__file__).parents[3] / "docs"


def reasons() -> set[str]:
    """What the error classes of the package have as `reason`."""
    return {
        line.value.value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
        for line in node.body
        if isinstance(line, ast.Assign | ast.AnnAssign) and isinstance(line.value, ast.Constant)
        if "reason" in ast.unparse(line).partition("=")[0]
    }


def retry_reasons() -> Iterator[str]:
    """The first argument of every TryAgain(...) and .retry(...) of the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name not in {"TryAgain", "retry"}:
                continue
            given = node.args[0]
            if isinstance(given, ast.Constant):
                yield given.value
            elif isinstance(given, ast.JoinedStr):
                assert isinstance(given.values[0], ast.Constant)
                yield given.values[0].value + "503"
            else:
                # Passed on as it came.
                assert ast.unparse(given) == "cause.reason", path


def test_every_reason_of_an_error_has_words_and_a_hint() -> None:
    """not_found had none for months."""
    found = reasons()
    assert {"internal", "not_found"} < found
    assert FAILURES.keys() == {*found, ENGINE_ENDED}
    for reason, words in FAILURES.items():
        assert words.short in failed(reason, 1)
        assert words.hint.endswith(".")


def test_every_reason_of_an_error_is_documented() -> None:
    """In the metric's row, and for whom the alert calls."""
    row = next(
        line
        for line in (DOCS / "metrics.md").read_text().splitlines()
        if line.startswith("| `tensorserve_failures_total")
    )
    assert FAILURES.keys() - set(re.findall(r"`(\w+)`", row)) == set()
    alerts = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "alerts.md").read_text(), re.MULTILINE))
    # A wrong command line ends before there are metrics.
    assert FAILURES.keys() - alerts == {"usage"}


def test_every_reason_to_send_a_request_again_has_words() -> None:
    """All literals of the sources and the loader, and no word without one."""
    found = set(retry_reasons())
    assert {reason for reason in found if not reason.startswith(STATUS_PREFIX)} == RETRIES.keys()
    assert retry_words(f"{STATUS_PREFIX}503") == "the source answered 503"
    for reason in RETRIES:
        assert retry_words(reason) == RETRIES[reason] != reason


def test_every_phase_has_words() -> None:
    """A title, what it does, and that it is done."""
    assert PHASE_WORDS.keys() == set(Phase) == set(PHASES)
    for words in PHASE_WORDS.values():
        assert all((words.title, words.running, words.done))


def test_a_check_is_one_of_the_list() -> None:
    """mypy holds the callers to `Check`; each of the list is used by one of them."""
    source = "\n".join(path.read_text() for path in (PACKAGE / "launch").rglob("*.py"))
    used = {Check[name] for name in re.findall(r"\bCheck\.([A-Z_]+)", source)}
    assert 'Check(f"{what} port")' in source
    used |= {Check(f"{what} port") for what in re.findall(r'check_port\("(\w+)"', source)}
    used.add(Check.METRICS_PORT)
    assert used == set(Check)


def test_every_weak_way_to_verify_has_a_caution() -> None:
    """On the page, where the container's log has a warning."""
    assert CAUTIONS.keys() == WARNINGS.keys()
    assert CAUTIONS.keys() < set(MODES)
