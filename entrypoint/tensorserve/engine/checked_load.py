"""Which results of the checks before the start does a load compare with its file?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.launch.context import Shard
from tensorserve.loading import LoadOptions


def checked_as(
    options: LoadOptions,
    shard: Shard,
    index: FileIndex,
    records: Sequence[TensorRecord],
    source_name: str,
) -> LoadOptions:
    """`options` for a load of `records` that compares the digests of the checked `shard`.

    `index` was read by the loader from `source_name`. Raises CorruptError if it is not the one that
    was checked.
    """
    check_same_index(shard, index, source_name)
    digests: dict[int, bytes] = {}
    if shard.digests is not None:
        every = bytes.fromhex(shard.digests)
        digests = {
            r.header_offset: every[32 * n : 32 * n + 32] for n, r in enumerate(index.tensors)
        }
    return replace(
        options,
        verify_hashes=shard.check_digests,
        digests=digests,
        headers_sha256=shard.headers_sha256,
        left_out=left_out(index, records),
    )


def check_same_index(shard: Shard, index: FileIndex, source_name: str) -> None:
    """Raises CorruptError if `index` is not the one that was checked.

    Call it before `index` is used: a server may give a different file for each request.
    """
    if shard.index_sha256 not in {None, index.digest}:
        raise CorruptError(
            f"The index of {source_name} is not the one that this start checked.",
            hint="Start again; upload models under a new name instead of over an old one.",
        )


def left_out(index: FileIndex, records: Sequence[TensorRecord]) -> tuple[TensorRecord, ...]:
    """The tensors of the file that are not among `records`."""
    taken = {record.header_offset for record in records}
    return tuple(record for record in index.tensors if record.header_offset not in taken)
