"""A plugin of pytest: all outcomes as JSON, written after each test, with the device's name.

python -m pytest -p bench.gpu_kit_report --device cuda --report FILE tests/gpu
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.device import device_facts


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`, `--report`."""
    parser.addoption("--device", default="cuda", help="that the tests of a GPU run on")
    parser.addoption("--report", type=Path, required=True, help="the JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """The tests take their device from the environment (tests/gpu/conftest.py)."""
    device: str = config.getoption("--device")
    os.environ["GPU_TESTS_DEVICE"] = device
    config.pluginmanager.register(Report(config.getoption("--report"), device))


class Report:
    """Collects outcomes."""

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}
        self._content = {
            "machine": results.machine() | {"gpu": device_facts(device)},
            "complete": False,
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of setup, call and teardown: the worst counts."""
        found = self._tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        found["seconds"] = round(found["seconds"] + report.duration, 3)
        if report.failed:
            found |= {"outcome": "failed", "said": report.longreprtext[-4000:]}
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            found |= {"outcome": "skipped", "said": reason}
        if report.when == "teardown":
            self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._tests[report.nodeid] = {"outcome": "failed", "said": report.longreprtext[-4000:]}

    def pytest_sessionfinish(self) -> None:
        """All have run."""
        self._content["complete"] = True
        self._write()

    def _write(self) -> None:
        outcomes = [test["outcome"] for test in self._tests.values()]
        counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
        results.write(
            "gpu-tests", self._content | {"counts": counts, "tests": self._tests}, self._path
        )
