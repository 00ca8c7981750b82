"""What do the headers say of the tensors, as they were read last?"""

from __future__ import annotations

from tensorserve.errors import CorruptError
from tensorserve.format import TensorHeader, TensorRecord, parse_header
from tensorserve.loading.counters import LoadProgress
from tensorserve.sources import Source


class TensorHeaders:
    """The headers of one load. Thread-safe."""

    def __init__(self, source: Source, progress: LoadProgress, *, encrypted: bool) -> None:
        self._source = source
        self._progress = progress
        self._encrypted = encrypted
        self.as_read: dict[int, bytes] = {}
        """{offset: header}, as it was read last."""

    def parse(self, record: TensorRecord, data: bytes | bytearray) -> TensorHeader:
        """The header that arrived. Read a second time where it does not parse: the first may have
        been damaged on the way. Raises CorruptError.
        """
        try:
            return self._parse(record, data)
        except CorruptError:
            return self.read_again(record)[0]

    def keep(self, record: TensorRecord, data: bytes) -> None:
        """A header that was taken without `parse`."""
        self.as_read[record.header_offset] = data

    def read_again(self, record: TensorRecord) -> tuple[TensorHeader, bool]:
        """The header in the file now, and whether it is, byte for byte, the one read before.

        Raises CorruptError, and the source's errors.
        """
        self._progress.retry("corrupt")
        before = self.as_read.get(record.header_offset)
        data = bytearray(record.header_length)
        self._source.read_again(record.header_offset, memoryview(data))
        return self._parse(record, data), bytes(data) == before

    def _parse(self, record: TensorRecord, data: bytes | bytearray) -> TensorHeader:
        header = parse_header(
            record, memoryview(data), encrypted=self._encrypted, source_name=self._source.name
        )
        self.as_read[record.header_offset] = bytes(data)
        return header
