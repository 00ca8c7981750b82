"""Has a start come to a stand, or lost a worker while vLLM waits for it? Then it is to be ended.

vLLM 0.32.0 notices an engine core that ends (v1/engine/utils.py:1384), a worker that ends before it
has loaded (v1/executor/multiproc_executor.py, `wait_for_ready`) and one that ends later
(`start_worker_monitor`). It waits for ever where a worker raises after its load and one of a lower
rank waits for it in a collective: no process ends, and the answers are read in the order of ranks
(`collective_rpc`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tensorserve.errors import StartStalledError, TensorserveError, WorkerLostError
from tensorserve.linux import Watched
from tensorserve.telemetry import StartState

GRACE_SECONDS = 20.0
"""How long vLLM may take to end by itself, with its own message and code, after a worker was lost:
it gives its workers 5 s and then 4 s more (`_ensure_worker_termination`)."""
# What a longer time between two looks adds: a container that was paused has not been silent.
_LONGEST_STEP = 5.0


@dataclass(frozen=True)
class Ending:
    """The start is to be ended: for `error`, or for the failure that the event log has already."""

    error: TensorserveError | None


class StartWatch:
    """Judges one start. Reads no clock, no file and no process."""

    def __init__(self, deadline: float) -> None:
        """`deadline`: seconds without any advance; 0: none."""
        self._deadline = deadline
        self._looked: float | None = None
        self._clock = 0.0
        """Seconds that this process has run, by its looks."""
        self._sign: float | None = None
        self._since = 0.0
        """When the last sign was seen, on `_clock`."""
        self._failing: float | None = None
        """When the first failure or loss was seen, on `_clock`."""

    def over(self, state: StartState) -> bool:
        """Whether there is nothing more to judge: it is ready, or will never be seen to be.

        An engine without an API (`--api-server-count=0`) is watched until it has loaded.
        """
        return state.ready_at is not None or (state.health_url is None and state.load_complete)

    def look(self, now: float, state: StartState, lost: Collection[int]) -> Ending | None:
        """Whether the start is to be ended. `now`: monotonic seconds; `lost`: ranks that ended."""
        if self._looked is not None:
            self._clock += min(now - self._looked, _LONGEST_STEP)
        self._looked = now
        if state.began is None or self.over(state):
            return None
        if state.last_sign != self._sign:
            self._sign, self._since = state.last_sign, self._clock
        if state.failure is not None or state.failed_workers or lost:
            if self._failing is None:
                self._failing = self._clock
            if self._clock - self._failing < GRACE_SECONDS:
                return None
            return Ending(None if state.failure is not None else _loss(state, lost))
        silent = self._clock - self._since
        if self._deadline and silent >= self._deadline:
            return Ending(_stall(state, silent))
        return None


class Workers:
    """The processes in which a start's ranks load, known from the event log.

    By their process numbers, not as children: vLLM's engine core, or a fork server, is their
    parent.
    """

    def __init__(self) -> None:
        self._watched: dict[int, tuple[int, Watched]] = {}

    def lost(self, state: StartState) -> list[int]:
        """Ranks whose process has ended, reaped or not."""
        for rank, load in state.ranks.items():
            if load.pid is not None and self._watched.get(rank, (0,))[0] != load.pid:
                self._watched[rank] = load.pid, Watched(load.pid)
        return sorted(rank for rank, (_, process) in self._watched.items() if process.ended(0))


def _loss(state: StartState, lost: Collection[int]) -> WorkerLostError:
    happened = [f"the worker of rank {rank} ended" for rank in sorted(lost)]
    happened += [f"rank {rank} raised {error}" for rank, error in state.failed_workers.items()]
    return WorkerLostError(
        f"A worker was lost in the phase {state.phase}, and vLLM did not end: "
        f"{'; '.join(happened)}.",
        hint="The lines above say why. On a machine with too little memory, lower "
        "TENSORSERVE_VLLM_MAX_MODEL_LEN or TENSORSERVE_VLLM_GPU_MEMORY_UTILIZATION.",
    )


def _stall(state: StartState, silent: float) -> StartStalledError:
    return StartStalledError(
        f"The start made no progress for {silent:.0f} s in the phase {state.phase}: no byte was "
        "loaded, no phase ended, and nothing new was printed.",
        hint="The lines above say what it did last. If it needs longer (kernels that are compiled "
        "for the first time), raise TENSORSERVE_START_DEADLINE; 0 switches it off.",
    )
