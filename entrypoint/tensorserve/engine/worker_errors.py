"""What does a worker raise after its load? The event log is told: vLLM may never come to read it.

A worker of vLLM logs what it raises and sends it to the engine core, which reads the answers in the
order of ranks. So an earlier rank that waits for this one in a collective keeps it from being read
(v1/executor/multiproc_executor.py, `_execute_worker_rpc` and `collective_rpc`, 0.32.0). What ends
the start then is launch/start_watch.py.
"""

from __future__ import annotations

import logging

from tensorserve.telemetry import EventLog
from tensorserve.telemetry.schema import WorkerFailed

_WORKERS_LOGGER = "vllm.v1.executor.multiproc_executor"
_MOST_CHARACTERS = 300


def report_errors(log: EventLog, rank: int) -> None:
    """From now on, tell `log` of the first error that vLLM's worker of this process logs."""
    logger = logging.getLogger(_WORKERS_LOGGER)
    if not any(isinstance(handler, _Reporter) for handler in logger.handlers):
        logger.addHandler(_Reporter(log, rank))


class _Reporter(logging.Handler):
    def __init__(self, log: EventLog, rank: int) -> None:
        super().__init__(logging.ERROR)
        self._log = log
        self._rank = rank
        self._told = False

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or self._told:
            return
        self._told = True
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        self._log.emit(WorkerFailed(self._rank, said[:_MOST_CHARACTERS]))
