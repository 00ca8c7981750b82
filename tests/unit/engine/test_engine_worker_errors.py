"""What vLLM's worker logs as an exception is in the event log, once."""

from __future__ import annotations

import ast
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorserve.engine.worker_errors import report_errors
from tensorserve.telemetry import EventLog, events_path, read_events
from tensorserve.telemetry.schema import WorkerFailed

LOGGER = "vllm.v1.executor.multiproc_executor"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """vLLM's own, as it was afterwards."""
    found = logging.getLogger(LOGGER)
    before = found.handlers[:]
    yield found
    found.handlers = before


def test_the_first_error_is_reported(tmp_path: Path, logger: logging.Logger) -> None:
    """Its first line; also where a second model was loaded by the same worker."""
    log = EventLog(events_path(tmp_path))
    report_errors(log, 1)
    report_errors(log, 1)
    logger.error("no exception")
    for number in (1, 2):
        try:
            raise RuntimeError(f"fault {number}\nin many lines {'x' * 1000}")
        except RuntimeError:
            logger.exception("WorkerProc hit an exception.")
    (record,) = read_events(events_path(tmp_path))
    assert record.event == WorkerFailed(1, "RuntimeError: fault 1")


def test_vllm_logs_there_what_a_worker_raises() -> None:
    """Read in the installed vLLM, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = map(Path, spec.submodule_search_locations)
    tree = ast.parse((folder / "v1/executor/multiproc_executor.py").read_text())
    (asked,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_execute_worker_rpc"
    ]
    (handler,) = [node for node in ast.walk(asked) if isinstance(node, ast.ExceptHandler)]
    assert "logger.exception('WorkerProc hit an exception.')" in ast.unparse(handler)
