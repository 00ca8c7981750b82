"""Who runs the engine under supervisord, stops it in time and records its exit code?

A small parent process of `tensorserve serve`: supervisord does not report a program's exit code, so
this process writes it into the event log. It also ends a start that has come to a stand
(start_watch.py); `tensorserve serve` without `up` has no such parent.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from tensorserve.cgroup_memory import MemoryGroup, memory_group
from tensorserve.errors import (
    OutOfMemoryError,
    StartStalledError,
    TensorserveError,
    WorkerLostError,
)
from tensorserve.launch.context import receive_start
from tensorserve.launch.handoff import holder
from tensorserve.launch.start_watch import StartWatch, Workers
from tensorserve.launch.stopping import engine_seconds
from tensorserve.linux import Watched, end_with_parent, hide_memory
from tensorserve.telemetry import EventLog, StartFollower, events_path, read_state
from tensorserve.telemetry.probe import answers
from tensorserve.telemetry.schema import EngineExited, StartFailed

_SECONDS_BETWEEN_LOOKS = 0.5


def run_engine(serve: Callable[[], int], reference: str) -> int:
    """Fork; the child runs `serve` (which becomes vLLM). Give the exit code, 128+n for a signal.

    `reference`: where `up` has left the start.
    """
    start = receive_start(reference)
    above = Watched(holder(reference))
    path = events_path(start.settings.state_dir)
    drain = start.plan.options.drain_seconds
    killed_before = memory_group().kills
    watch = _Watch(path, start.settings.start_deadline, killed_before)
    child, stopped = 0, False
    deadline: float | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped, deadline
        stopped = True
        if deadline is None:
            serving = read_state(path).ready
            deadline = time.monotonic() + engine_seconds(drain, serving=serving)
        if child:
            _signal_quietly(child, signal.SIGTERM)

    # Before the fork: a signal that came right after it would end this process alone.
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    child = os.fork()
    if child == 0:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        # Kept across exec: vLLM ends with this process, whatever ends it.
        end_with_parent()
        # A group of its own: the engine's workers are ended with it.
        os.setpgid(0, 0)
        os._exit(_guarded(serve))
    # After the fork: the child's memory must stay readable, its children open the hand-over.
    hide_memory()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if deadline is not None and time.monotonic() > deadline:
            _signal_group(child, signal.SIGKILL)
        # 50 ms bound the delay after the child's end, and after a signal.
        if above.ended(0.05):
            # `up` was killed, so nothing else would end the engine.
            _signal_group(child, signal.SIGKILL)
        if deadline is None and watch.ends_the_start():
            deadline = time.monotonic() + engine_seconds(drain, serving=False)
            _signal_quietly(child, signal.SIGTERM)
    _signal_group(child, signal.SIGKILL)  # workers that outlived their parent
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    failure = read_state(path).failure
    memory = memory_group()
    if stopped:
        # Killed because it did not stop in time after a signal: a stop, not a crash.
        code = 128 + signal.SIGTERM
    elif failure is not None:
        # Our loader failed inside vLLM, which ends with 1 whatever the reason; or it was ended.
        code = failure.exit_code
    elif _killed(memory, killed_before):
        # vLLM notices only that one of its processes has gone, and exits with 1.
        code = 128 + signal.SIGKILL
        _tell_of_memory(EventLog(path), memory, code)
    elif code == 0:
        # vLLM exits with 0 after its engine has died; no stop was asked for.
        code = 1
    EventLog(path).emit(EngineExited(code))
    return code


class _Watch:
    """Looks at the start from time to time, until it is ready."""

    def __init__(self, path: Path, deadline: float, killed_before: int | None) -> None:
        self._log = EventLog(path)
        self._follower = StartFollower(path)
        self._killed_before = killed_before
        self._start = StartWatch(deadline)
        self._workers = Workers()
        self._next = 0.0
        self._over = False

    def ends_the_start(self) -> bool:
        """Whether the engine is to be ended; the reason is in the event log then."""
        now = time.monotonic()
        if self._over or now < self._next:
            return False
        self._next = now + _SECONDS_BETWEEN_LOOKS
        try:
            state = self._follower.poll()
        except OSError:
            return False  # an event log that cannot be read says nothing about the start
        if self._start.over(state):
            self._over = True
            return False
        ending = self._start.look(now, state, self._workers.lost(state))
        if ending is None:
            return False
        self._over = True
        if isinstance(ending.error, StartStalledError) and (
            state.health_url is not None and answers(state.health_url)
        ):
            # It serves, and nobody could write so: a full state directory, a dead exporter.
            return False
        if ending.error is not None:
            self._tell_of(ending.error)
        return True

    def _tell_of(self, error: TensorserveError) -> None:
        memory = memory_group()
        if isinstance(error, WorkerLostError) and _killed(memory, self._killed_before):
            _tell_of_memory(self._log, memory, OutOfMemoryError.exit_code)
            return
        print(f"tensorserve: error: {error}", file=sys.stderr, flush=True)
        self._log.emit(StartFailed.by(error))


def _killed(memory: MemoryGroup, before: int | None) -> bool:
    """Whether the kernel has killed a process of the container since `before` kills."""
    return (memory.kills or 0) > (before or 0)


def _tell_of_memory(log: EventLog, memory: MemoryGroup, code: int) -> None:
    peak = memory.peak or memory.used
    figures = (("limit", memory.limit), ("peak", peak))
    said = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in figures if value is not None)
    error = OutOfMemoryError(
        f"The kernel ended a process of the engine: out of memory{said and f' ({said})'}.",
        hint="Raise the container's memory limit, or lower TENSORSERVE_HOST_MEMORY_LIMIT, "
        "TENSORSERVE_VLLM_MAX_MODEL_LEN or VLLM_CPU_KVCACHE_SPACE.",
    )
    print(f"tensorserve: error: {error}", file=sys.stderr, flush=True)
    log.emit(StartFailed(error.reason, code, str(error), memory.limit, peak))


def _guarded(serve: Callable[[], int]) -> int:
    try:
        return serve()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else TensorserveError.exit_code


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
