"""In which pieces a .tensors file is read: ranges in file order, each decrypted on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tensorserve.format import TensorRecord

# A range large enough that a request's latency is small beside it (8 MiB at S3's 90 MB/s a
# connection take 90 ms), and small enough that many connections share one tensor.
# A multiple of tensorizer's 2 MiB cipher chunks, so that whole chunks arrive together.
RANGE_BYTES = 8 * 1024**2
# Smaller neighbours are read in one request.
BATCH_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of one tensor's data; the first piece brings the header too."""

    record: TensorRecord
    start: int
    stop: int

    @property
    def file_start(self) -> int:
        """Where the piece begins in the file."""
        return (
            self.record.header_offset if self.start == 0 else self.record.data_offset + self.start
        )

    @property
    def file_stop(self) -> int:
        """Where it ends."""
        return self.record.data_offset + self.stop


@dataclass(frozen=True, slots=True)
class Range:
    """One request: neighbouring pieces, read together."""

    pieces: tuple[Piece, ...]

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.pieces[0].file_start

    @property
    def length(self) -> int:
        """Bytes to read."""
        return self.pieces[-1].file_stop - self.offset


def ranges(records: Iterable[TensorRecord], range_bytes: int = RANGE_BYTES) -> Iterator[Range]:
    """The requests that read `records` (in file order), each tensor's pieces in order."""
    batch: list[Piece] = []
    for record in records:
        if record.length > BATCH_BYTES:
            if batch:
                yield Range(tuple(batch))
                batch = []
            for start in range(0, record.length, range_bytes):
                stop = min(start + range_bytes, record.length)
                yield Range((Piece(record, start, stop),))
            continue
        if batch and (
            record.data_offset + record.length - batch[0].file_start > BATCH_BYTES
            or record.header_offset - batch[-1].file_stop > 64 * 1024
        ):
            yield Range(tuple(batch))
            batch = []
        batch.append(Piece(record, 0, record.length))
    if batch:
        yield Range(tuple(batch))
