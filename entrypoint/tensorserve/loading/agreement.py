"""Which part of a file does each rank open, if some ranks load it together?

Each says what it found and what it loads; from that, all come to the same result.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.loading.shares import Message, messages, own_records
from tensorserve.sources import Source
from tensorserve.telemetry.names import Sharing


@dataclass(frozen=True)
class Offer:
    """What a rank tells the others before the load."""

    size: int
    """Bytes of the file."""
    index: str
    """SHA-256 of its index."""
    headers: str | None
    """SHA-256 of its headers, from the manifest."""
    version: str | None
    """What pins the file's version; None where nothing does."""
    wanted: frozenset[int]
    """Header offsets of the tensors that it loads."""
    most: int | None
    """The longest tensor in bytes that can come from another rank; None: any."""
    name: str = field(default_factory=lambda: f"tensorserve-{secrets.token_hex(16)}")
    """That of the first rank names the load."""


@dataclass(frozen=True)
class Agreement:
    """How this rank loads."""

    sharing: Sharing
    messages: tuple[Message, ...] = ()
    """Those of this rank, in file order, where it shares the load."""
    left_out: tuple[TensorRecord, ...] = ()
    """The file's tensors that no rank loads, where this one reads their headers for all."""
    name: str = ""
    """Of this load, for its RankGroup."""

    def opened(self, records: Sequence[TensorRecord], rank: int) -> list[TensorRecord]:
        """Which of `records`, all that it loads, this rank opens itself."""
        if self.sharing is not Sharing.SHARED:
            return list(records)
        return own_records(self.messages, rank)


def offer_of(
    source: Source,
    index: FileIndex,
    headers: str | None,
    records: Iterable[TensorRecord],
    *,
    most: int | None,
) -> Offer:
    """What this rank, which loads `records` of `source`, tells the others."""
    return Offer(
        source.size,
        index.digest,
        headers,
        source.version if source.pinned else None,
        frozenset(record.header_offset for record in records),
        most,
    )


def agree(
    offer: Offer, index: FileIndex, rank: int, gather: Callable[[Offer], list[Offer]]
) -> Agreement:
    """How `rank` loads, by what `gather` gives of all ranks. Raises CorruptError, in all of them,
    where they found different files.
    """
    offers = gather(offer)
    if len({(one.size, one.index, one.headers, one.version) for one in offers}) > 1:
        raise CorruptError(
            "The ranks of this engine found different versions of the weights.",
            hint="The file was replaced while it was read, or the server gives each rank another "
            "one. Start again; upload models under a new name instead of over an old one.",
        )
    wanted = frozenset[int]().union(*(one.wanted for one in offers))
    limits = [one.most for one in offers if one.most is not None]
    most = min(limits, default=index.size)
    loaded = [record for record in index.tensors if record.header_offset in wanted]
    common = {
        record.header_offset
        for record in loaded
        if record.length <= most and all(record.header_offset in one.wanted for one in offers)
    }
    every = messages(loaded, common, len(offers))
    if all(message.owner is None for message in every):
        return Agreement(Sharing.NOTHING)
    mine = tuple(
        message
        for message in every
        if message.owner is not None or message.records[0].header_offset in offer.wanted
    )
    left_out = tuple(r for r in index.tensors if r.header_offset not in wanted)
    return Agreement(Sharing.SHARED, mine, left_out if rank == 0 else (), offers[0].name)
