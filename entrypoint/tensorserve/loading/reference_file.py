"""What does tensorizer's reader read? A file object whose index and headers are checked before.

tensorizer trusts every length that it reads, ignores how many bytes a read returns, and seeks to
any offset. So this object fills every read wholly or raises, and returns no header before it was
parsed and compared with the checked index.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NoReturn

from tensorserve.format import FileIndex, TensorRecord
from tensorserve.loading.tuning import DEFAULTS


class LoadEndedError(RuntimeError):
    """The load was ended; these bytes are not needed any more."""


class ReferenceFile(io.RawIOBase):
    """The .tensors file of `index`, for a TensorDeserializer with one reader.

    `head`: the bytes before the first header, checked. `header(record)` gives a header, checked,
    and may wait. `read(record, offset, buffer)` fills `buffer` from `offset` in the file with a
    tensor's data. `enter()` is called in each thread that reads, but for the one that made this
    file, before its first read.
    """

    def __init__(
        self,
        index: FileIndex,
        head: bytes,
        *,
        header: Callable[[TensorRecord], bytes],
        read: Callable[[TensorRecord, int, memoryview], None],
        enter: Callable[[], None],
    ) -> None:
        super().__init__()
        self._records = index.tensors
        self._offsets = [record.header_offset for record in index.tensors]
        self._head = head
        self._header_of = header
        self._read_data = read
        self._enter = enter
        self._entered = {threading.get_ident()}
        self._at = 0
        self._header: tuple[TensorRecord, bytes] | None = None
        self._reading = threading.Lock()
        self._ended = False

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes; tensorizer only seeks forwards."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As files do, except from the file's end."""
        if whence not in {io.SEEK_SET, io.SEEK_CUR}:
            raise io.UnsupportedOperation("this file has no end to seek from")
        thread = threading.get_ident()
        if thread not in self._entered:
            self._entered.add(thread)
            self._enter()
        self._at = offset if whence == io.SEEK_SET else self._at + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` wholly. Raises the source's errors, CorruptError, LoadEndedError."""
        view = memoryview(buffer).cast("B")
        length = len(view)
        while len(view):
            with self._reading:
                if self._ended:
                    raise LoadEndedError("the load has ended")
                count = self._fill(view)
            self._at += count
            view = view[count:]
        return length

    def end(self, seconds: float) -> None:
        """End all reads; waits at most `seconds` for one that is running."""
        self._ended = True
        if self._reading.acquire(timeout=seconds):
            self._reading.release()
        # They refer to the owner of this file: with that reference cycle, tensorizer's threads
        # would live until the next garbage collection.
        self._header_of, self._read_data, self._enter = _nothing, _nothing, _nothing

    def _fill(self, view: memoryview) -> int:
        """Some bytes at the beginning of `view`; gives how many."""
        if self._at < len(self._head):
            return _copy(self._head[self._at : self._at + len(view)], view)
        record = self._records[bisect_right(self._offsets, self._at) - 1]
        if self._at < record.data_offset:
            if self._header is None or self._header[0] is not record:
                self._header = record, self._header_of(record)
            start = self._at - record.header_offset
            return _copy(self._header[1][start : start + len(view)], view)
        count = min(len(view), record.end - self._at, DEFAULTS.reference_read_bytes)
        if count <= 0:
            raise ValueError(f"byte {self._at} is after the last tensor")
        self._read_data(record, self._at, view[:count])
        return count


def _nothing(*_: object) -> NoReturn:
    raise LoadEndedError("the load has ended")


def _copy(data: bytes, view: memoryview) -> int:
    view[: len(data)] = data
    return len(data)
