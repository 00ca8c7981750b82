"""Who opens what: the same for all ranks, divided by bytes, and only where it is one file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.loading.agreement import Agreement, Offer, agree
from tensorserve.loading.shares import ALIGNMENT, messages, own_records
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.telemetry.names import Sharing

MIB = 1024**2


def index_of(*lengths: int) -> FileIndex:
    """A file with tensors of these lengths."""
    records, offset = [], 1000
    for number, length in enumerate(lengths):
        records.append(
            TensorRecord(
                name=f"t{number}", kind=0, dtype="uint8", shape=(length,), header_offset=offset,
                data_offset=offset + 100, length=length, raw_dtype="u1", raw_name=b"t",
                is_meta=False, long_shape=False,
            )
        )  # fmt: skip
        offset += 100 + length
    return FileIndex(4, True, tuple(records), offset, sum(lengths), "digest")


def offers(index: FileIndex, *wanted: tuple[int, ...], most: int | None = None) -> list[Offer]:
    """Of ranks that load the tensors with these numbers."""
    return [
        Offer(
            index.size, index.digest, "headers", "version",
            frozenset(index.tensors[number].header_offset for number in numbers), most,
        )
        for numbers in wanted
    ]  # fmt: skip


def agreements(index: FileIndex, every: list[Offer]) -> list[Agreement]:
    """What each rank makes of it."""
    return [agree(offer, index, rank, lambda _: every) for rank, offer in enumerate(every)]


def names(records: object) -> list[str]:
    return [record.name for record in records]  # type: ignore[attr-defined]


def test_each_tensor_has_one_owner_and_ranks_have_equal_parts() -> None:
    """Layers of a model: no rank has more than a tensor above its part."""
    lengths = [300 * MIB, *([2 * MIB, 6 * MIB, 10_000, 500, 20 * MIB, 20 * MIB, 10_000] * 40)]
    index = index_of(*lengths)
    every = tuple(range(len(lengths)))
    for ranks in (2, 4, 8):
        found = agreements(index, offers(index, *[every] * ranks))
        assert {one.sharing for one in found} == {Sharing.SHARED}
        assert len({one.messages for one in found}) == len({one.name for one in found}) == 1
        parts = [own_records(one.messages, rank) for rank, one in enumerate(found)]
        assert sorted(n for part in parts for n in names(part)) == sorted(names(index.tensors))
        opened = [sum(record.length for record in part) for part in parts]
        assert max(opened) - min(opened) <= 300 * MIB
        assert max(opened[1:]) - min(opened[1:]) <= 40 * MIB


def test_a_small_file_is_divided_as_well() -> None:
    """Its runs are shorter than a job."""
    index = index_of(*[10_000] * 64)
    every = tuple(range(64))
    found = agreements(index, offers(index, every, every))
    opened = [
        sum(record.length for record in own_records(one.messages, rank))
        for rank, one in enumerate(found)
    ]
    assert opened == [320_000, 320_000]


def test_small_neighbours_go_together_and_aligned() -> None:
    """One message each 8 MiB, not one for each of a thousand norms; a large tensor goes alone."""
    index = index_of(*[7] * 1000, 64 * MIB, 7)
    common = {record.header_offset for record in index.tensors}
    (norms, large, last) = messages(index.tensors, common, 1)
    assert len(norms.records) == 1000
    assert all(place % ALIGNMENT == 0 for place in norms.places)
    assert (large.length, last.length) == (64 * MIB, 7)
    every = messages(index_of(*[MIB] * 33).tensors, common | set(range(10**9, 10**9 + 1)), 2)
    assert all(m.length <= DEFAULTS.job_bytes + MIB for m in every)


def test_what_not_all_ranks_load_each_opens_itself() -> None:
    """Experts of one rank; the order of the file stays, and what no rank loads has one reader."""
    index = index_of(*[MIB] * 6)
    first, second = agreements(index, offers(index, (0, 1, 3), (0, 2, 3)))
    assert [m.owner for m in first.messages].count(None) == 1
    loaded = [names(m.records) for m in first.messages]
    assert [name for group in loaded for name in group] == ["t0", "t1", "t3"]
    assert [n for m in second.messages for n in names(m.records)] == ["t0", "t2", "t3"]
    shared = [m for m in first.messages if m.owner is not None]
    assert shared == [m for m in second.messages if m.owner is not None]
    assert names(first.left_out) == ["t4", "t5"]
    assert second.left_out == ()


@pytest.mark.parametrize(("wanted", "most"), [(((0,), (1,)), None), (((0, 1), (0, 1)), MIB - 1)])
def test_ranks_with_nothing_in_common_load_alone(
    wanted: tuple[tuple[int, ...], ...], most: int | None
) -> None:
    """Nothing wanted by all, or only what is too long for a GPU that takes slices."""
    index = index_of(MIB, MIB)
    for one in agreements(index, offers(index, *wanted, most=most)):
        assert one.sharing is Sharing.NOTHING


@pytest.mark.parametrize("field", ["size", "index", "headers", "version"])
def test_ranks_that_found_different_files_end(field: str) -> None:
    """F6: all of them, before a byte goes from one to the other."""
    index = index_of(MIB, MIB)
    one, other = offers(index, (0, 1), (0, 1))
    other = replace(other, **{field: 5 if field == "size" else "another"})
    for rank, offer in enumerate((one, other)):
        with pytest.raises(CorruptError, match="different versions"):
            agree(offer, index, rank, lambda _: [one, other])
