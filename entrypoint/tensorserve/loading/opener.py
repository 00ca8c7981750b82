"""From what stands in the file to a tensor's own bytes: decrypted, authenticated, in their place.

What looks damaged is read once more: on the wire, or at rest? What comes a second time is believed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from tensorserve.errors import CorruptError
from tensorserve.format import (
    FileKey,
    TagMismatchError,
    TensorHeader,
    TensorRecord,
    open_tensor_chunk,
    parse_header,
    verify_hashes,
)
from tensorserve.linux import populate
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import PART_BYTES
from tensorserve.loading.staging import Staging
from tensorserve.sources import Source

# Its number among the parts of a tensor.
_HEADER = -1


@dataclass(eq=False)
class _Joined:
    """Bytes that come in more than one piece."""

    memory: memoryview
    left: int


@dataclass(eq=False)
class Pending:
    """One tensor on its way."""

    record: TensorRecord
    memory: torch.Tensor  # uint8, of the record's length; where it is staged, on the device
    view: memoryview  # of the memory; of host memory, or empty, where it is staged
    budget: int  # bytes of the host memory limit that it takes
    left: int  # bytes that have not come to their place yet
    sealed: bool = False  # they come sealed, and are opened when all are there
    header: TensorHeader | None = None
    header_known: threading.Event = field(default_factory=threading.Event)
    # Where they come in two halves: the header (-1) and parts, by number, that are not whole yet.
    halves: dict[int, _Joined] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: object | None = None  # where it is staged: what to wait for on the device


class Opener:
    """Opens the tensors of one file. Thread-safe: parts of a tensor may come in any order."""

    def __init__(
        self,
        source: Source,
        key: FileKey | None,
        progress: LoadProgress,
        *,
        encrypted: bool,
        hashes: bool,
        staging: Staging | None = None,
    ) -> None:
        """With `staging`, tensors go on to a device; hashes cannot be checked then."""
        assert not (hashes and staging)
        self._staging = staging
        self._source = source
        self._key = key
        self._progress = progress
        self._encrypted = encrypted
        self._hashes = hashes
        self._headers: dict[int, bytes] = {}
        # Memory of joined parts, to be used again: fresh memory costs as much as decryption.
        self._spare: deque[memoryview] = deque()

    def headers_sha256(self) -> str:
        """SHA-256 (hex) of all headers so far, in file order: they hold nonces, tags and hashes."""
        headers = (self._headers[offset] for offset in sorted(self._headers))
        return hashlib.sha256(b"".join(headers)).hexdigest()

    def take_header(self, tensor: Pending, start: int, data: memoryview) -> bool:
        """Bytes of a tensor's header, from `start` of it on; True when that was all of the tensor.

        Raises CorruptError.
        """
        whole = self._join(tensor, _HEADER, tensor.record.header_length, start, data)
        if whole is None:
            return False
        try:
            self._parse(tensor, whole)
        except CorruptError:
            self._read_header_again(tensor)
        tensor.header_known.set()
        if tensor.record.length:
            return False
        self._complete(tensor)
        return True

    def take(self, tensor: Pending, start: int, data: memoryview, *, placed: bool = False) -> bool:
        """What stands in the file from `start` of the tensor on; True when it was the last of it.

        `data` is of one part (PART_BYTES), or `placed`: received in the tensor's own memory. Raises
        CorruptError.
        """
        header = tensor.header
        assert header is not None
        joined = False
        if header.chunks is not None and not tensor.sealed:
            part = start // PART_BYTES
            begin = part * PART_BYTES
            length = min(PART_BYTES, tensor.record.length - begin)
            whole = self._join(tensor, part, length, start - begin, data)
            if whole is None:
                return False
            joined = whole is not data
            start, data = begin, whole
        if self._staging is not None and not tensor.sealed:
            self._stage(self._staging, tensor, header, start, data)
        elif not placed:
            self._put(tensor, header, start, data, tensor.view[start : start + len(data)])
        if joined and len(data) == PART_BYTES:
            self._spare.append(data)
        with tensor.lock:
            tensor.left -= len(data)
            if tensor.left:
                return False
        self._complete(tensor)
        return True

    def _complete(self, tensor: Pending) -> None:
        header = tensor.header
        assert header is not None
        if tensor.sealed:
            self._open_boxes(tensor, header, 0, tensor.view, tensor.view)
        if self._hashes:
            verify_hashes(header, tensor.view)
        if self._staging is not None:
            if tensor.sealed:
                tensor.memory.copy_(torch.frombuffer(tensor.view, dtype=torch.uint8))
            tensor.sent = self._staging.sent()

    def _join(
        self, tensor: Pending, part: int, length: int, start: int, data: memoryview
    ) -> memoryview | None:
        """All `length` bytes of a part, when `data` (from its `start` on) was the last of them."""
        if len(data) == length:
            return data
        with tensor.lock:
            if part not in tensor.halves:
                tensor.halves[part] = _Joined(self._spare_memory(length), length)
            joined = tensor.halves[part]
        joined.memory[start : start + len(data)] = data
        with tensor.lock:
            joined.left -= len(data)
            if joined.left:
                return None
            del tensor.halves[part]
        return joined.memory

    def _spare_memory(self, length: int) -> memoryview:
        if length < PART_BYTES:
            return memoryview(bytearray(length))
        try:
            return self._spare.pop()
        except IndexError:
            return memoryview(bytearray(PART_BYTES))

    def _stage(
        self,
        staging: Staging,
        tensor: Pending,
        header: TensorHeader,
        start: int,
        data: memoryview,
    ) -> None:
        if not len(data):
            return
        slot = staging.take()
        try:
            self._put(tensor, header, start, data, slot.numpy().data[: len(data)])
        except BaseException:
            staging.give_back(slot)
            raise
        staging.send(slot, tensor.memory[start : start + len(data)])

    def _put(
        self,
        tensor: Pending,
        header: TensorHeader,
        start: int,
        data: memoryview,
        place: memoryview,
    ) -> None:
        """Open `data` into `place`; what is opened later only goes there."""
        if self._staging is None:
            populate(place)
        if header.chunks is not None and not tensor.sealed:
            self._open_boxes(tensor, header, start, data, place)
        else:
            place[:] = data

    def _parse(self, tensor: Pending, data: memoryview) -> None:
        record = tensor.record
        tensor.header = header = parse_header(
            record, data, encrypted=self._encrypted, source_name=self._source.name
        )
        if header.chunks is not None and record.length > PART_BYTES:
            size = record.length if header.chunks.count == 1 else header.chunks.chunk_size
            # Chunks that are not cut as parts are: no part alone could be opened.
            tensor.sealed = PART_BYTES % size != 0
            if tensor.sealed and self._staging is not None and not tensor.view:
                tensor.view = memoryview(bytearray(record.length))
        self._headers[record.header_offset] = bytes(data)

    def _read_header_again(self, tensor: Pending) -> None:
        self._progress.retry("corrupt")
        record = tensor.record
        data = self._source.read(record.header_offset, record.header_length)
        self._parse(tensor, memoryview(data))

    def _open_boxes(
        self,
        tensor: Pending,
        header: TensorHeader,
        start: int,
        sealed: memoryview,
        out: memoryview,
    ) -> None:
        """Open the chunks that `sealed` holds whole, which begins at `start` of the tensor."""
        chunks, length = header.chunks, tensor.record.length
        assert chunks is not None
        began = time.monotonic()
        size = length if chunks.count == 1 else chunks.chunk_size
        for index in range(start // size, -(-(start + len(sealed)) // size)):
            a, b = chunks.chunk_bounds(index, length)
            box = slice(a - start, b - start)
            self._open(tensor, header, index, sealed[box], out[box])
        self._progress.stage("decrypt", len(sealed), time.monotonic() - began)

    def _open(
        self,
        tensor: Pending,
        header: TensorHeader,
        index: int,
        sealed: memoryview,
        out: memoryview,
    ) -> None:
        assert self._key is not None
        assert header.chunks is not None
        try:
            open_tensor_chunk(header, self._key.for_header(header), index, sealed, out)
        except TagMismatchError:
            # libsodium checks before it writes. Nonce and tag may be what is damaged.
            start, _ = header.chunks.chunk_bounds(index, tensor.record.length)
            self._read_header_again(tensor)
            self._source.read_into(tensor.record.data_offset + start, sealed)
            assert tensor.header is not None
            key = self._key.for_header(tensor.header)
            open_tensor_chunk(tensor.header, key, index, sealed, out)
