"""How does vLLM's program import once, beside the checks, for all processes of the engine?

In order: import what all of vLLM's processes need; fork the server from which they are forked
(engine/fork_server.py); import what the API server alone needs while the fork server imports what
workers need; wait for the checks. A check that fails ends the program at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tensorserve.engine import fork_server
from tensorserve.launch.import_first import (
    CHECKER_VARIABLE,
    Checker,
    Program,
    current_checker,
    receive_program,
)
from tensorserve.launch.vllm_model_cache import architectures_in
from tensorserve.telemetry import EventLog
from tensorserve.telemetry.schema import EngineProcessStarted

# API server, engine core and workers import these.
_SHARED = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
_API_SERVER = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.openai.api_server",
)
# After vllm.platforms has found the device: {its name: the worker's module and others}.
_WORKERS = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
}
_LOADER = ("vllm.model_executor.model_loader", "tensorserve.engine.loader")


def import_beside_checks() -> None:
    """Import vLLM and start the fork server, where `serve` runs its checks beside this program.

    Then sys.argv and os.environ are those that the checks ended with. Does nothing otherwise.
    """
    checker = current_checker(os.environ)
    if checker is None:
        return
    del os.environ[CHECKER_VARIABLE]
    answer = _Answer(checker)
    try:
        _import(_SHARED)
        model_dir = Path(sys.argv[2])
        events = Path(checker.events)
        fork_server.start(events.parent, lambda: _import_for_workers(model_dir), _telling(events))
        _import(_API_SERVER)
        fork_server.imports_are_done()
    except BaseException:
        answer.wait()  # a check that fails says why better than an import
        raise
    program = answer.wait()
    if checker.interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(program.arguments)
    os.environ.update(program.environment)


class _Answer:
    """The checks' answer, waited for by a thread so that a failed check ends an import."""

    def __init__(self, checker: Checker) -> None:
        self._program: Program | None = None
        self._thread = threading.Thread(
            target=self._receive, args=(checker,), name="tensorserve-checks", daemon=True
        )
        self._thread.start()

    def _receive(self, checker: Checker) -> None:
        try:
            self._program = receive_program(checker)
        except SystemExit as ending:
            # From here the process can only be ended as a whole; it holds nothing to tidy up.
            os._exit(int(str(ending.code)))

    def wait(self) -> Program:
        """Until the checks have passed; does not return where one has failed."""
        self._thread.join()
        assert self._program is not None
        return self._program


def _telling(events: Path) -> fork_server.Told:
    def told(process: str, way: str, reason: str | None) -> None:
        EventLog(events).emit(EngineProcessStarted(process, way, reason))

    return told


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


def _import_for_workers(model_dir: Path) -> None:
    """What only workers need. What cannot be imported is imported, and reported, by a worker."""
    from vllm.platforms import current_platform
    from vllm.utils.system_utils import set_process_title

    set_process_title("fork_server", prefix="tensorserve")  # else as the process that forked it

    for module in (*_WORKERS.get(current_platform.device_type, ()), *_LOADER):
        with suppress(ImportError):
            importlib.import_module(module)
    with suppress(ImportError, OSError, ValueError):
        _import_model(model_dir)


def _import_model(model_dir: Path) -> None:
    """vLLM's module for the class in config.json, where the file is there already."""
    from vllm.model_executor.models.registry import ModelRegistry

    for name in architectures_in(model_dir):
        registered = ModelRegistry.models.get(name)
        module = getattr(registered, "module_name", None)
        if isinstance(module, str):
            importlib.import_module(module)
