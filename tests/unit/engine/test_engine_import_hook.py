"""What is to be done when a module is imported is done then, once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorserve.engine.import_hook import when_imported

NAME = "package_for_a_test.module"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on sys.path; what is imported of it is forgotten afterwards."""
    directory = tmp_path / "package_for_a_test"
    directory.mkdir()
    (directory / "__init__.py").touch()
    (directory / "module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield directory
    for name in [name for name in sys.modules if name.startswith("package_for_a_test")]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_it_waits_for_the_import() -> None:
    """And sees the module whole."""
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    importlib.import_module("package_for_a_test")
    assert seen == []
    importlib.import_module(NAME)
    importlib.import_module(NAME)
    assert seen == [1]


@pytest.mark.usefixtures("package")
def test_who_only_looks_changes_nothing() -> None:
    """transformers asks whether there is a module before it imports it, or does not."""
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    assert importlib.util.find_spec(NAME) is not None
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [1]


@pytest.mark.usefixtures("package")
def test_where_it_is_imported_nothing_waits() -> None:
    """vLLM's pack command has it before plugins are loaded."""
    importlib.import_module(NAME)
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    assert seen == [1]


@pytest.mark.usefixtures("package")
def test_asked_twice_it_is_done_twice() -> None:
    """The second one registers what the first one did."""
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(1))
    when_imported(NAME, lambda: seen.append(2))
    importlib.import_module(NAME)
    assert sorted(seen) == [1, 2]


def test_what_fails_is_not_hidden(package: Path) -> None:
    """In the act, or in the module."""

    def fail() -> None:
        raise RuntimeError("no loader")

    when_imported(NAME, fail)
    with pytest.raises(RuntimeError, match="no loader"):
        importlib.import_module(NAME)
    (package / "broken.py").write_text("1 / 0\n")
    when_imported("package_for_a_test.broken", lambda: pytest.fail("it was not imported"))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("package_for_a_test.broken")
    when_imported("package_for_a_test.missing", lambda: pytest.fail("there is none"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("package_for_a_test.missing")
