"""Do the events add up to the right phases, bytes, rates and failures?"""

from __future__ import annotations

import pytest

from telemetry_starts import at, begin, end, progress, whole_start
from tensorserve.telemetry import StartState, fold
from tensorserve.telemetry.event_codec import Record
from tensorserve.telemetry.event_values import label
from tensorserve.telemetry.fold import apply


def test_phases_sum_to_the_total_after_each_event() -> None:
    """No time of a start belongs to no phase, or to two, however far it has come."""
    state = StartState()
    for event in whole_start():
        apply(state, event)
        now = min(event.t + 0.5, 160)
        assert sum(state.phase_seconds(now).values()) == pytest.approx(state.startup_seconds(now))
    assert state.startup_seconds(now=999) == 60


def test_each_phase_has_its_duration() -> None:
    """Time before the first phase is preflight's; the end of one phase begins the next."""
    assert fold(whole_start()).phase_seconds(999) == {
        "preflight": 2,
        "artifacts": 1,
        "import": 27,
        "init": 1,  # its end is not in the log: the load's begin is
        "load": 10,
        "postprocess": 1,
        "warmup": 18,
    }


def test_a_running_phase_grows_with_the_clock() -> None:
    """Its duration is what has gone by so far."""
    state = fold(
        [at(10, "start"), begin(10, "preflight"), end(12, "preflight"), begin(13, "import")]
    )
    assert state.phase == "import"
    assert state.phase_seconds(20) == {"preflight": 2, "import": 8}


def test_a_second_load_in_one_start_adds_to_its_phases_and_bytes() -> None:
    """A draft model is loaded after the model, by a loader that counts from zero again."""
    state = fold(
        [
            at(0, "start"),
            begin(0, "load"),
            at(0, "load_plan", rank=0, bytes=1000, tensors=2),
            progress(4, 1000, requests=5),
            at(5, "load_done", rank=0),
            end(5, "load"),
            begin(6, "warmup"),
            begin(7, "load"),
            at(7, "load_plan", rank=0, bytes=200, tensors=1),
            progress(8, 100, requests=2),
        ]
    )
    assert not state.load_complete
    assert (state.planned_bytes, state.copied_bytes, state.requests) == (1200, 1100, 7)
    assert state.phase_seconds(9) == {"load": 7, "warmup": 2}


def test_a_line_that_was_overtaken_takes_nothing_back() -> None:
    """Counters never fall, though an older snapshot be written after a newer one."""
    state = fold([*whole_start()[:10], progress(136, 500), progress(135, 400)])
    assert state.copied_bytes == 500


def test_the_rate_of_a_running_load_is_that_of_the_last_seconds() -> None:
    """An early stall does not weigh on it for ever."""
    plan = at(0, "load_plan", rank=0, bytes=10_000, tensors=1)
    slow = [progress(t, 1) for t in range(1, 60)]
    fast = [progress(60 + t, 1 + 100 * t) for t in range(11)]
    state = fold([at(0, "start"), plan, *slow, *fast])
    assert state.rank_rate(0, 70) == pytest.approx(100)
    assert state.eta(70) == pytest.approx((10_000 - 1001) / 100)


def test_a_stall_shows_as_no_rate_and_no_eta() -> None:
    """A load that stands still is not said to end."""
    state = fold([*whole_start()[:10], progress(132, 500)])
    assert state.rate(133) > 0
    assert state.rate(140) == 0
    assert state.eta(140) is None
    assert state.last_advance == 132


def test_a_load_advances_before_its_first_tensor_is_in_the_model() -> None:
    """A large first tensor, over a slow link, must look neither like a stall nor like 0 %."""
    state = fold([*whole_start()[:10], progress(133, 0, fetch=400)])
    assert (state.copied_bytes, state.arrived_bytes, state.progress) == (0, 400, 0.4)
    assert (state.rate(133), state.eta(133)) == (200, 3)


def test_what_has_arrived_and_is_not_in_the_model_is_not_the_end() -> None:
    """The rest of the time is that of the copying."""
    arrived = progress(133, 0, fetch=1000)
    state = fold([*whole_start()[:10], arrived, progress(135, 400, fetch=1000)])
    assert (state.arrived_bytes, state.progress) == (1000, 0.99)
    assert (state.rate(135), state.eta(135)) == (100, 6)
    assert fold([*whole_start()[:10], arrived, progress(135, 1000)]).progress == 1


def test_after_the_load_the_rate_is_its_mean() -> None:
    """1000 bytes in 10 s, whenever one asks."""
    state = fold(whole_start())
    assert (state.rate(150), state.rank_rate(0, 9999), state.eta(9999)) == (100, 100, 0)


def test_a_load_is_complete_when_all_ranks_that_planned_are_done() -> None:
    """One rank's end does not make the other's."""
    state = fold([at(0, "start")])
    assert not state.load_complete
    for rank in (0, 1):
        apply(state, at(1, "load_plan", rank=rank, bytes=10, tensors=1))
    apply(state, at(2, "load_done", rank=1))
    assert not state.load_complete
    apply(state, at(3, "load_done", rank=0))
    assert state.load_complete


def test_a_second_start_begins_anew_but_counters_go_on() -> None:
    """Phases, ranks and failure are the last start's; failures and retries are all starts'."""
    state = fold(
        [
            *whole_start()[:11],
            at(137, "failure", reason="corrupt", exit_code=65, message="m"),
            at(138, "engine_exit", code=65),
            at(200, "start", start_id="b"),
            at(201, "load_plan", rank=0, bytes=10, tensors=1),
            progress(202, 5, requests=2, retries={"reset": 4}),
        ]
    )
    assert (state.failure, state.engine_exit, state.planned_bytes) == (None, None, 10)
    assert state.failures == {"corrupt": 1}
    assert (state.requests, state.retries) == (6, {"reset": 5})


def test_one_failure_reported_by_several_processes_counts_once() -> None:
    """Each rank reports the damaged file, and the engine's exit follows from it."""
    failure = {"reason": "corrupt", "exit_code": 65, "message": "m"}
    state = fold(
        [
            at(0, "start"),
            at(1, "failure", **failure),
            at(1, "failure", **failure),
            at(2, "engine_exit", code=65),
        ]
    )
    assert state.failures == {"corrupt": 1}


def test_an_engine_that_ends_by_itself_is_a_failure() -> None:
    """vLLM's own crash leaves no failure event, only a code."""
    state = fold([*whole_start(), at(170, "engine_exit", code=137)])
    assert state.failures == {"engine": 1}
    assert (state.phase, state.ready) == ("failed", False)


@pytest.mark.parametrize("code", [0, 130, 143])
def test_an_engine_that_was_asked_to_end_is_no_failure(code: int) -> None:
    """docker stop, Ctrl-C, or vLLM's own clean end."""
    state = fold([*whole_start(), at(170, "engine_exit", code=code)])
    assert (state.failures, state.phase, state.ready) == ({}, "stopped", False)


def test_the_clock_of_a_start_that_failed_stands_still() -> None:
    """The time after the engine's end belongs to no phase."""
    state = fold([at(0, "start"), begin(1, "import"), at(9, "engine_exit", code=1)])
    assert state.phase_seconds(500) == {"import": 9}


def test_an_earlier_starts_ready_does_not_make_this_one_ready() -> None:
    """An exporter may have asked the engine that has just ended."""
    state = fold([*whole_start(), at(161, "start", start_id="b"), at(162, "ready", start_id="a")])
    assert not state.ready


@pytest.mark.parametrize(
    "damaged",
    [
        at(1, "phase"),
        at(1, "phase", phase=["x"], state="begin"),
        at(1, "phase", phase="s3://canary", state="begin"),
        at(1, "load_plan", rank="0", bytes=1),
        at(1, "load_plan", rank=-1, bytes=1),
        at(1, "load_plan", rank=0, bytes="many"),
        at(1, "load_progress", rank=0),
        at(1, "load_done", rank=5),
        at(1, "failure"),
        at(1, "engine_exit"),
        at(1, "unheard_of"),
    ],
)
def test_a_damaged_event_does_not_stop_the_fold(damaged: Record) -> None:
    """A log may be damaged, or written by another version; what follows still counts."""
    state = fold([at(0, "start"), damaged, at(2, "start", start_id="b"), begin(3, "load")])
    assert (state.start_id, state.phase) == ("b", "load")


def test_labels_take_only_names_of_our_own_making() -> None:
    """A URL, a path or a long text would be the user's data."""
    assert label("status_503") == "status_503"
    for text in ("s3://bucket/x", "Wrong", "a b", "", "x" * 41, "é", None, 7):
        assert label(text) == "other"


def test_counts_of_adapters_run_over_all_starts() -> None:
    """A new engine counts from zero again; what was held went with the old one."""
    first = {"loads": 2, "load_seconds": 1.5, "hits": 5, "failures": {"corrupt": 1}, "held": 2}
    second = {"loads": 1, "load_seconds": 0.5, "failures": {"corrupt": 1, "name": 3}, "held": 1}
    state = fold([at(0, "start"), at(1, "adapter_counts", **first)])
    assert state.adapters is not None
    assert state.adapters.held == 2
    apply(state, at(2, "start", start_id="b"))
    assert (state.adapters.held, state.adapters.loads) == (0, 2)
    for moment in (3, 4):  # cumulative: the same twice adds nothing
        apply(state, at(moment, "adapter_counts", **second))
    assert (state.adapters.loads, state.adapters.hits, state.adapters.held) == (3, 5, 1)
    assert state.adapters.load_seconds == 2.0
    assert state.adapters.failures == {"corrupt": 2, "name": 3}
