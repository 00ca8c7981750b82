"""When is a start ended from outside? With a clock that the test sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection

import pytest

from telemetry_starts import at, begin, progress, whole_start
from tensorserve.errors import StartStalledError, WorkerLostError
from tensorserve.launch.start_watch import GRACE_SECONDS, Ending, StartWatch, Workers
from tensorserve.telemetry import StartState, fold
from tensorserve.telemetry.event_codec import Record
from waiting import wait_for

URL = "http://127.0.0.1:1/health"
BEGUN = [at(100, "start", start_id="a", health_url=URL), begin(101, "preflight")]
PLANNED = [*BEGUN, begin(110, "load"), at(110, "load_plan", rank=0, bytes=1000, tensors=2)]
LOADED = [*PLANNED, progress(111, 1000), at(112, "load_done", rank=0), begin(113, "warmup")]
DEADLINE = 60.0


class Watched:
    """A watch that looks once a second."""

    def __init__(self, deadline: float = DEADLINE) -> None:
        self.watch = StartWatch(deadline)
        self.now = 1000.0

    def look(
        self, seconds: float, records: list[Record], lost: Collection[int] = ()
    ) -> Ending | None:
        """The first verdict within `seconds`, in which the event log is `records`."""
        state = fold(records)
        end = self.now + seconds
        while self.now < end:
            self.now += 1
            if ending := self.watch.look(self.now, state, lost):
                return ending
        return None


SIGNS = {
    "a phase": [begin(200, "artifacts")],
    "a check": [at(200, "check", name="weights", found="x")],
    "output": [at(200, "output")],
    "bytes": [
        begin(150, "load"),
        at(150, "load_plan", rank=0, bytes=9, tensors=1),
        progress(200, 5),
    ],
}


@pytest.mark.parametrize("sign", SIGNS)
def test_each_advance_begins_the_deadline_anew(sign: str) -> None:
    """Whatever advances, and the deadline counts whole afterwards."""
    watched = Watched()
    assert watched.look(DEADLINE - 1, BEGUN) is None
    more = [*BEGUN, *SIGNS[sign]]
    assert watched.look(DEADLINE, more) is None
    ending = watched.look(5, more)
    assert ending is not None
    assert isinstance(ending.error, StartStalledError)
    assert ending.error.exit_code == 70
    assert f"no progress for {DEADLINE:.0f} s in the phase" in str(ending.error)


def test_what_is_no_advance() -> None:
    """Requests that are sent again, and counts that stay as they were."""
    watched = Watched()
    loading = [*PLANNED, progress(120, 500)]
    assert watched.look(DEADLINE, loading) is None
    again = progress(130, 500, requests=9, retries={"reset": 9})
    assert watched.look(2, [*loading, again]) is not None


def test_without_a_deadline_it_waits_for_ever() -> None:
    """TENSORSERVE_START_DEADLINE=0."""
    assert Watched(0).look(100_000, BEGUN) is None


@pytest.mark.parametrize(
    ("records", "over"),
    [
        ([], False),
        (BEGUN, False),
        (LOADED, False),
        (whole_start(), True),
        ([at(100, "start", start_id="a"), *PLANNED[1:]], False),
        ([at(100, "start", start_id="a"), *LOADED[1:]], True),
    ],
    ids=["nothing", "begun", "loaded", "ready", "without an API", "without an API, loaded"],
)
def test_when_the_watch_is_over(records: list[Record], over: bool) -> None:
    """Nothing that happens to a start that serves is its business."""
    state = fold(records)
    assert StartWatch(DEADLINE).over(state) is over
    if over:
        assert Watched().look(10 * DEADLINE, records, [0]) is None


def test_a_log_without_a_start_ends_nothing() -> None:
    """`up` could not write it."""
    assert Watched().look(10 * DEADLINE, []) is None


def test_a_container_that_was_paused_is_not_ended() -> None:
    """Its processes had no time in which to advance."""
    watched = Watched()
    assert watched.look(5, BEGUN) is None
    watched.now += 10_000
    assert watched.look(DEADLINE / 2, BEGUN) is None
    assert watched.look(DEADLINE, BEGUN) is not None


RAISED = at(120, "worker_failed", rank=1, error="RuntimeError: no")


@pytest.mark.parametrize(
    ("more", "lost", "said"),
    [
        ([], [2], "the worker of rank 2 ended"),
        ([RAISED], [], "rank 1 raised RuntimeError: no"),
        ([RAISED], [0], "the worker of rank 0 ended; rank 1 raised RuntimeError: no"),
    ],
)
def test_a_lost_worker_ends_it_after_vllms_own_time(
    more: list[Record], lost: list[int], said: str
) -> None:
    """In which vLLM's own message and code come through. Without a deadline too."""
    watched = Watched(0)
    assert watched.look(100, LOADED) is None
    records = [*LOADED, *more]
    assert watched.look(GRACE_SECONDS, records, lost) is None
    ending = watched.look(1, records, lost)
    assert ending is not None
    assert isinstance(ending.error, WorkerLostError)
    assert said in str(ending.error)
    assert "in the phase warmup" in str(ending.error)


def test_a_failed_start_that_does_not_end_is_ended() -> None:
    """For the failure that is in the log; a lost worker is a consequence of it."""
    watched = Watched(0)
    failed = [*PLANNED, at(120, "failure", reason="corrupt", exit_code=65, message="m")]
    assert watched.look(GRACE_SECONDS, failed, [0]) is None
    assert watched.look(1, failed, [0]) == Ending(None)


def test_workers_are_known_from_the_log() -> None:
    """One that was reaped, one that was not, and one that lives; none before it has loaded."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)
    ]
    try:
        state = StartState()
        workers = Workers()
        assert workers.lost(state) == []
        records = [at(100, "start", start_id="a")]
        for rank, process in enumerate(processes):
            records.append(at(110, "load_plan", rank=rank, bytes=1, tensors=1, pid=process.pid))
        state = fold(records)
        assert workers.lost(state) == []
        processes[0].kill()
        processes[0].wait()
        processes[1].kill()
        os.waitid(os.P_PID, processes[1].pid, os.WEXITED | os.WNOWAIT)
        wait_for(lambda: workers.lost(state) == [0, 1])
    finally:
        for process in processes:
            process.kill()
            process.communicate()
