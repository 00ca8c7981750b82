"""The engine as supervisord sees it: runs `tensorserve serve`, ends it in time, records its code.

supervisord tells nobody the exit code of a program, so this small parent writes it
into the event log.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from tensorserve.errors import OutOfMemoryError
from tensorserve.handoff import holder
from tensorserve.linux import Watched, end_with_parent, hide_memory
from tensorserve.memory_group import MemoryGroup, memory_group
from tensorserve.settings import HANDOFF_VARIABLE
from tensorserve.start import receive_start
from tensorserve.telemetry import EventLog, events_path, fold, read_events

# A start that is told to stop is gone within 5 s (docker's default patience is 10 s): nothing that
# vLLM does while loading is worth waiting for.
STOP_SECONDS_LOADING = 3.0
# When serving, vLLM gets its own time to drain (--shutdown-timeout) and this much on top.
STOP_SECONDS_SERVING = 5.0


def run_engine(serve: Callable[[], int]) -> int:
    """Fork; the child runs `serve` (which becomes vLLM). Give the exit code, 128+n for a signal."""
    reference = os.environ[HANDOFF_VARIABLE]
    start = receive_start(reference)
    above = Watched(holder(reference))
    path = events_path(start.settings.state_dir)
    drain = _drain_seconds(start.settings.flags)
    killed_before = memory_group().kills
    child = os.fork()
    if child == 0:
        # Kept across exec: vLLM ends with this process, whatever ends it.
        end_with_parent()
        # A group of its own: the engine's workers are ended with it.
        os.setpgid(0, 0)
        os._exit(_guarded(serve))
    # After the fork: the child hands over what its own children open.
    hide_memory()
    deadline: float | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal deadline
        if deadline is None:
            serving = fold(read_events(path)).ready
            seconds = drain + STOP_SECONDS_SERVING if serving else STOP_SECONDS_LOADING
            deadline = time.monotonic() + seconds
        _signal_quietly(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() > deadline:
            _signal_group(child, signal.SIGKILL)
        # 50 ms bound the delay after the child's end, and after a signal.
        if above.ended(0.05):
            # `up` was killed, and with it whoever would end what runs below.
            _signal_group(child, signal.SIGKILL)
    _signal_group(child, signal.SIGKILL)  # workers that outlived their parent
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    failure = fold(read_events(path)).failure
    memory = memory_group()
    if deadline is not None:
        # Killed because it was told to stop and did not in time: that is stopping, not crashing.
        code = 128 + signal.SIGTERM
    elif failure is not None:
        # Our loader failed inside vLLM, which ends with 1 whatever the reason.
        code = failure.exit_code
    elif (memory.kills or 0) > (killed_before or 0):
        # vLLM sees no more than that a process of its own has gone, and ends with 1.
        code = 128 + signal.SIGKILL
        _tell_of_memory(EventLog(path), memory, code)
    elif code == 0:
        # vLLM ends "in order" after its engine has died; nobody had asked it to.
        code = 1
    EventLog(path).emit("engine_exit", code=code)
    return code


def _tell_of_memory(log: EventLog, memory: MemoryGroup, code: int) -> None:
    figures = {"limit": memory.limit, "peak": memory.peak or memory.used}
    known = {name: value for name, value in figures.items() if value is not None}
    said = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in known.items())
    error = OutOfMemoryError(
        f"The kernel ended a process of the engine: out of memory{said and f' ({said})'}.",
        hint="Raise the container's memory limit, or lower TENSORSERVE_HOST_MEMORY_LIMIT, "
        "TENSORSERVE_VLLM_MAX_MODEL_LEN or VLLM_CPU_KVCACHE_SPACE.",
    )
    print(f"tensorserve: error: {error}", file=sys.stderr, flush=True)
    log.emit("failure", reason=error.reason, exit_code=code, message=str(error), **known)


def _guarded(serve: Callable[[], int]) -> int:
    try:
        return serve()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 70


def _drain_seconds(flags: tuple[tuple[str, tuple[str, ...]], ...]) -> float:
    """vLLM's --shutdown-timeout, as configured by variable; its default is 0."""
    for name, words in flags:
        if name == "shutdown-timeout":
            return float(words[0].partition("=")[2])
    return 0.0


def _signal_quietly(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has ended: nothing to tell


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return  # the group is empty
