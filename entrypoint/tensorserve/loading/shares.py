"""Which rank of several opens which tensors of one file, and what goes to the others together?

Every rank works it out for itself, from the same index, and comes to the same result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tensorserve.format import TensorRecord
from tensorserve.loading.tuning import DEFAULTS

# Each tensor of a message begins at a multiple of it, as torch's views of other dtypes need.
ALIGNMENT = 64


@dataclass(frozen=True)
class Message:
    """Neighbouring tensors that one rank opens and gives to the others in one broadcast."""

    records: tuple[TensorRecord, ...]
    owner: int | None
    """The rank that opens them; None: each rank that needs them opens them itself."""

    @property
    def places(self) -> tuple[int, ...]:
        """Where each tensor begins in the message, in bytes."""
        places, place = [], 0
        for record in self.records:
            places.append(place)
            place += -(-record.length // ALIGNMENT) * ALIGNMENT
        return tuple(places)

    @property
    def length(self) -> int:
        """Bytes, with what aligns the tensors."""
        return self.places[-1] + self.records[-1].length


def messages(
    records: Iterable[TensorRecord], common: Collection[int], ranks: int
) -> tuple[Message, ...]:
    """The messages of `records`, in file order.

    `records`: what any rank loads, in file order. `common`: the header offsets of what all of them
    load. Each next run of these goes to the rank that has the fewest bytes so far, so that all are
    at about the same place of the file.
    """
    records = tuple(records)
    shared = sum(record.length for record in records if _goes(record, common))
    # A file of a few jobs is divided as well.
    run = max(1, min(DEFAULTS.job_bytes, shared // (ranks * DEFAULTS.least_runs)))
    made: list[Message] = []
    small: list[TensorRecord] = []
    opened = [0] * ranks
    owner = in_run = 0

    def flush() -> None:
        if small:
            made.append(Message(tuple(small), owner))
            small.clear()

    for record in records:
        if not _goes(record, common):
            flush()
            made.append(Message((record,), None))
            continue
        if in_run >= run:
            flush()
            owner, in_run = opened.index(min(opened)), 0
        opened[owner] += record.length
        in_run += record.length
        if record.length > DEFAULTS.gathered_bytes:
            flush()
            made.append(Message((record,), owner))
        else:
            small.append(record)
    flush()
    return tuple(made)


def own_records(messages: Sequence[Message], rank: int) -> list[TensorRecord]:
    """What `rank` opens itself, in file order."""
    return [r for message in messages if message.owner in {None, rank} for r in message.records]


def _goes(record: TensorRecord, common: Collection[int]) -> bool:
    # A tensor without bytes has nothing to send.
    return bool(record.length) and not record.is_meta and record.header_offset in common
