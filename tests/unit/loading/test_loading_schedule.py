"""Which job a free connection gets: every byte once, short ones at the end, none left waiting."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tensorserve.format import TensorRecord
from tensorserve.loading import schedule as schedule_module
from tensorserve.loading.schedule import JOB_PARTS, PART_BYTES, Job, Schedule

MIB = 1024**2


def records(*sizes: int) -> list[TensorRecord]:
    """Tensors one after the other, with headers of 100 bytes."""
    made, offset = [], 1000
    for number, size in enumerate(sizes):
        made.append(
            TensorRecord(
                name=f"t{number}", kind=0, dtype="uint8", shape=(size,), header_offset=offset,
                data_offset=offset + 100, length=size, raw_dtype="uint8", raw_name=b"t",
                is_meta=False, long_shape=False,
            )
        )  # fmt: skip
        offset += 100 + size
    return made


def schedule(of: Iterable[TensorRecord]) -> Schedule[TensorRecord]:
    return Schedule(of, lambda admitted: admitted)


def parts_of(job: Job[TensorRecord]) -> set[tuple[str, int]]:
    if job.batch:
        return {(record.name, -1) for record in job.tensors}
    return {(job.tensors[0].name, part) for part in range(job.next, job.stop)}


def test_every_part_is_given_out_once() -> None:
    """Small neighbours together, large tensors in runs of parts, in file order."""
    tensors = records(1, 10, 0, 9 * MIB + 1, 3 * MIB, MIB, 5, 40 * MIB)
    one = schedule(tensors)
    seen: list[tuple[str, int]] = []
    while job := one.claim(3):
        assert parts_of(job).isdisjoint(seen)
        seen += sorted(parts_of(job))
    expected = {(r.name, -1) for r in tensors if r.length <= 4 * MIB} | {
        (r.name, part)
        for r in tensors
        if r.length > 4 * MIB
        for part in range(-(-r.length // PART_BYTES))
    }
    assert set(seen) == expected
    assert [name for name, _ in seen] == sorted(name for name, _ in seen)


def test_jobs_get_shorter_towards_the_end() -> None:
    """Each of many connections gets its share of what is left, though not single parts."""
    lengths = []
    many = schedule(records(100 * PART_BYTES))
    while job := many.claim(8):
        lengths.append(job.stop - job.next)
    assert lengths[0] == JOB_PARTS
    assert lengths[-8:] == [2] * 8
    assert lengths == sorted(lengths, reverse=True)


def test_a_free_connection_takes_the_rest_of_a_slow_ones_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But never the part that is on its way, and a single one only where it takes long."""
    monkeypatch.setattr(schedule_module, "_PATIENCE", 3600)
    one = schedule(records(100 * PART_BYTES))
    slow = one.claim(1)
    assert slow is not None
    running = [slow]
    while job := one.claim(1):
        one.end(job)
    assert (slow.next, slow.stop) == (0, JOB_PARTS)
    first = one.steal()
    assert first is not None
    assert parts_of(first) == {("t0", 2), ("t0", 3)}
    running.append(first)
    assert one.steal() is None
    monkeypatch.setattr(schedule_module, "_PATIENCE", 0)
    taken = parts_of(first)
    while job := one.steal():
        running.append(job)
        taken |= parts_of(job)
    assert taken | {("t0", 2)} == {("t0", part) for part in range(1, JOB_PARTS)}
    assert slow.stop == 1
    # What is left are the parts on their way: one a job.
    assert all(job.stop - job.next == 1 for job in running)
    assert not one.passed(slow)


def test_a_part_that_hangs_is_given_out_a_second_time_once() -> None:
    """To one other connection, not to all."""
    one = schedule(records(5 * MIB))
    job = one.claim(1)
    assert job is not None
    assert one.double(older_than=3600) is None
    assert one.double(older_than=-1) == (job.tensors[0], 0)
    assert one.double(older_than=-1) is None
    one.passed(job)
    assert one.double(older_than=-1) == (job.tensors[0], 1)
    one.end(job)
    assert one.double(older_than=-1) is None
