"""Which job a free connection gets: every byte once, short ones at the end, none left waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorserve.format import TensorRecord
from tensorserve.loading import scheduler as scheduler_module
from tensorserve.loading.scheduler import Job, Scheduler
from tensorserve.loading.tuning import DEFAULTS

MIB = 1024**2
SPANS = DEFAULTS.job_bytes // DEFAULTS.part_bytes


def records(*sizes: int, gaps: Sequence[int] = (), at: int = 1000) -> list[TensorRecord]:
    """Tensors one after the other, with headers of 100 bytes."""
    made, offset = [], at
    for number, size in enumerate(sizes):
        made.append(
            TensorRecord(
                name=f"t{number}", kind=0, dtype="uint8", shape=(size,), header_offset=offset,
                data_offset=offset + 100, length=size, raw_dtype="uint8", raw_name=b"t",
                is_meta=False, long_shape=False,
            )
        )  # fmt: skip
        offset += 100 + size + (gaps[number] if number < len(gaps) else 0)
    return made


def schedule(of: Iterable[TensorRecord], *, aligned: bool = False) -> Scheduler[TensorRecord]:
    return Scheduler(of, lambda record: record, aligned=aligned)


def jobs_of(one: Scheduler[TensorRecord], connections: int = 1) -> list[Job[TensorRecord]]:
    found = []
    while job := one.claim(connections):
        found.append(job)
    return found


def covered(jobs: Iterable[Job[TensorRecord]]) -> list[tuple[str, bool, int, int]]:
    """(tensor, header?, start, stop) of all pieces, in the order in which they are given out."""
    return [
        (piece.target.name, piece.header, piece.start, piece.start + piece.length)
        for job in jobs
        for span in job.spans[job.next : job.stop]
        for piece in span.pieces
    ]


@given(
    sizes=st.lists(
        st.sampled_from(
            [
                0,
                1,
                5000,
                DEFAULTS.small_bytes,
                DEFAULTS.small_bytes + 1,
                DEFAULTS.part_bytes,
                9 * MIB + 7,
            ]
        ),
        min_size=1,
        max_size=12,
    ),
    gaps=st.lists(st.sampled_from([0, 0, 10, 65_536, 65_537, 3 * MIB]), max_size=12),
    at=st.integers(0, 9 * MIB),
    connections=st.sampled_from([1, 3, 64]),
    aligned=st.booleans(),
)
def test_every_byte_is_given_out_once_in_its_spans_place(
    sizes: list[int], gaps: list[int], at: int, connections: int, aligned: bool
) -> None:
    """In file order, a span no longer than a part, a job without holes."""
    tensors = {record.name: record for record in records(*sizes, gaps=gaps, at=at)}
    jobs = jobs_of(schedule(tensors.values(), aligned=aligned), connections)
    ends: dict[tuple[str, bool], int] = {}
    for name, header, start, stop in covered(jobs):
        assert start == ends.get((name, header), 0)
        ends[name, header] = stop
    for name, record in tensors.items():
        assert ends[name, True] == record.header_length
        assert ends.get((name, False), 0) == record.length
    for job in jobs:
        for before, after in zip(job.spans, job.spans[1:], strict=False):
            assert before.offset + before.length == after.offset
        for span in job.spans:
            assert 0 < span.length <= DEFAULTS.part_bytes
            at = span.offset
            for piece in span.pieces:
                record = piece.target
                base = record.header_offset if piece.header else record.data_offset
                assert at == base + piece.start
                at += piece.length
            assert not span.pieces or at == span.offset + span.length


@pytest.mark.parametrize("connections", [1, 64])
def test_requests_end_where_object_stores_cut(connections: int) -> None:
    """At multiples of 8 MiB, at the end of 4; across tensors, and only the file's ends are not."""
    jobs = jobs_of(schedule(records(5 * MIB, 30 * MIB, 100, 7 * MIB), aligned=True), connections)
    bounds = [job.offset for job in jobs[1:]]
    assert all(
        bound % (DEFAULTS.job_bytes if connections == 1 else DEFAULTS.job_bytes // 2) == 0
        for bound in bounds
    )
    assert len(jobs) == (6 if connections == 1 else 11)


def test_requests_are_longer_on_a_fast_link() -> None:
    """Up to what the link is worth, then shorter, at multiples of their size; four for each."""
    of = records(100 * 8 * MIB, at=8 * MIB)
    one = Scheduler(of, lambda record: record, longest=lambda: 64 * MIB, aligned=True)
    jobs = jobs_of(one, 2)
    sizes = [sum(span.length for span in job.spans) // MIB for job in jobs]
    assert sizes[0] == 56  # the file begins at 8 MiB
    assert sizes[1] == 64
    assert set(sizes[:-1]) <= {56, 64, 32, 16, 8, 4}
    assert all(after <= before for before, after in pairwise(sizes[1:]))
    assert all(job.offset % (4 * MIB) == 0 for job in jobs)


def test_what_has_no_room_yet_waits_for_its_own_job() -> None:
    """Its job must not hold the end of a tensor whose memory it needs."""
    asked: list[str] = []
    room = False

    def admit(record: TensorRecord) -> TensorRecord | None:
        asked.append(record.name)
        return record if room or record.name == "t0" else None

    one = Scheduler(records(3 * MIB, MIB // 2), admit, aligned=True)
    first = one.claim(1)
    assert first is not None
    assert (one.claim(1), one.all_given_out) == (None, False)  # nobody is held up by it
    room = True
    jobs = [first, *jobs_of(one)]
    assert [{name for name, *_ in covered([job])} for job in jobs] == [{"t0"}, {"t1"}]
    assert asked == ["t0", "t1", "t1", "t1"]
    assert one.all_given_out


def test_from_a_file_no_chunk_is_cut() -> None:
    """Nothing is gained there, and a chunk in two pieces must be put together."""
    jobs = jobs_of(schedule(records(30 * MIB + 5)))
    data = [(start, stop) for _, header, start, stop in covered(jobs) if not header]
    assert all(start % DEFAULTS.part_bytes == 0 for start, _ in data)
    assert len(data) == 16


def test_small_neighbours_are_received_together() -> None:
    """One buffer for all of a layer's norms and their headers."""
    (job,) = jobs_of(schedule(records(*[1000] * 50)))
    assert len(job.spans) == 1
    assert len(job.spans[0].pieces) == 100
    assert job.spans[0].data_bytes == 50_000


def test_jobs_get_shorter_towards_the_end() -> None:
    """Each of many connections gets its share of what is left, though not single parts."""
    jobs = jobs_of(schedule(records(100 * DEFAULTS.part_bytes)), 8)
    lengths = [sum(span.length for span in job.spans) // DEFAULTS.part_bytes for job in jobs]
    assert lengths[0] == SPANS
    assert lengths[-8:] == [2] * 8
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("room", "expected"), [(12 * 8 * MIB, 8 * MIB), (12 * 8 * MIB - 1, 4 * MIB)]
)
def test_where_memory_is_scarce_jobs_are_shorter(room: int, expected: int) -> None:
    """Eight connections: what has arrived waits for what stands before it, and takes room, too."""
    of = records(100 * 8 * MIB, at=8 * MIB)
    one = Scheduler(of, lambda record: record, lambda: room, aligned=True)
    job = one.claim(8)
    assert job is not None
    assert sum(span.length for span in job.spans) == expected


def test_a_free_connection_takes_the_rest_of_a_slow_ones_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But never the part that is on its way, and a single one only where it takes long."""
    monkeypatch.setattr(scheduler_module, "DEFAULTS", replace(DEFAULTS, steal_seconds=3600.0))
    one = schedule(records(100 * DEFAULTS.part_bytes))
    header = one.claim(1)
    assert header is not None
    slow = one.claim(1)
    assert slow is not None
    running = [slow]
    one.end(header)
    while job := one.claim(1):
        one.end(job)
    assert (slow.next, slow.stop) == (0, SPANS)
    first = one.steal()
    assert first is not None
    assert (first.next, first.stop, slow.stop) == (2, 4, 2)
    running.append(first)
    assert one.steal() is None
    monkeypatch.setattr(scheduler_module, "DEFAULTS", replace(DEFAULTS, steal_seconds=0.0))
    while job := one.steal():
        running.append(job)
    assert slow.stop == 1
    # What is left are the parts on their way: one a job.
    assert sorted(job.next for job in running) == [0, 1, 2, 3]
    assert all(job.stop - job.next == 1 for job in running)
    assert not one.passed(slow)


def test_the_last_jobs_are_worth_a_request_each() -> None:
    """Each connection's share of what is left is less; on a fast link it comes soon enough."""
    of = records(200 * 8 * MIB, at=8 * MIB)
    one = Scheduler(
        of,
        lambda record: record,
        longest=lambda: 64 * MIB,
        shortest=lambda: 16 * MIB,
        aligned=True,
    )
    sizes = [sum(span.length for span in job.spans) // MIB for job in jobs_of(one, 16)]
    assert set(sizes[:-1]) == {24, 32, 16}  # the first one ends at a multiple of its size
    assert sizes[-1] <= 16


def test_a_short_load_has_no_long_jobs() -> None:
    """Its tensors come one after the other: two for each connection, or of 8 MiB."""
    of = records(30 * MIB)
    one = Scheduler(of, lambda record: record, longest=lambda: 64 * MIB, shortest=lambda: 64 * MIB)
    sizes = [sum(span.length for span in job.spans) // MIB for job in jobs_of(one, 1)]
    assert sizes == [8, 8, 8, 6]


def test_what_comes_soon_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection would take longer; but where a span takes longer than usual, it is."""
    one = schedule(records(100 * DEFAULTS.part_bytes))
    while (job := one.claim(1)) is not None and job.stop - job.next < SPANS:
        one.end(job)
    assert job is not None
    one.passed(job)
    while rest := one.claim(1):
        one.end(rest)

    def set_to(least: float, factor: float) -> None:
        changed = replace(DEFAULTS, steal_least_seconds=least, straggler_factor=factor)
        monkeypatch.setattr(scheduler_module, "DEFAULTS", changed)

    set_to(3600.0, 1e12)
    assert one.steal() is None
    set_to(3600.0, 0.0)
    assert one.steal() is not None


def test_a_span_that_hangs_is_given_out_a_second_time_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To one other connection, not to all."""
    now = 100.0
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now)
    one = schedule(records(5 * MIB))
    job = one.claim(1)
    assert job is not None
    me = threading.get_ident()
    now += 0.4
    assert one.straggler() is None
    now += 0.2
    assert one.straggler() == (job.spans[0], me)
    assert one.straggler() is None
    one.passed(job)
    assert one.straggler() is None
    now += 0.6
    assert one.straggler() == (job.spans[1], me)
    one.end(job)
    assert one.straggler() is None


def test_on_a_slow_link_the_usual_time_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the last spans of a load would all come twice, over the link that is slow already."""
    now = 100.0
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now)
    one = schedule(records(200 * DEFAULTS.part_bytes))
    while job := one.claim(1):
        while True:
            now += 4.0
            if not one.passed(job):
                break
        one.end(job)
        last = job
    one._running.append(last)
    last.next, last.began = 0, now
    now += 8.0
    assert one.straggler() is None
    now += 8.0
    assert one.straggler() is not None


def test_the_first_byte_that_is_needed() -> None:
    """The prefetch process may free what stands before it."""
    one = schedule(records(100 * DEFAULTS.part_bytes))
    first, second = one.claim(1), one.claim(1)
    assert first is not None
    assert second is not None
    assert one.low_water() == 1000
    one.end(first)
    assert one.low_water() == second.offset
