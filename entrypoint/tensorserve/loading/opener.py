"""From what stands in the file to a tensor's own bytes: decrypted, authenticated, in their place.

What looks damaged is read once more: on the wire, or at rest? What comes a second time is believed.
"""

from __future__ import annotations

import hashlib
import threading
import time
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
from tensorserve.loading.schedule import BATCH_BYTES, PART_BYTES
from tensorserve.loading.staging import Staging
from tensorserve.sources import Source


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
    opened: set[int] = field(default_factory=set)  # parts that some thread opens or opened
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

    def headers_sha256(self) -> str:
        """SHA-256 (hex) of all headers so far, in file order: they hold nonces, tags and hashes."""
        headers = (self._headers[offset] for offset in sorted(self._headers))
        return hashlib.sha256(b"".join(headers)).hexdigest()

    def take_header(self, tensor: Pending, data: memoryview) -> None:
        """Parse a tensor's header. Raises CorruptError."""
        try:
            self._parse(tensor, data)
        except CorruptError:
            self._read_header_again(tensor)
        tensor.header_known.set()

    def take(self, tensor: Pending, start: int, data: memoryview) -> bool:
        """What stands in the file from `start` of the tensor on; True when it was the last of it.

        `data` is whole chunks, or all of the tensor. Raises CorruptError.
        """
        assert tensor.header is not None
        if self._staging is not None and not tensor.sealed:
            self._stage(self._staging, tensor, tensor.header, start, data)
        else:
            self._put(tensor, tensor.header, start, data, tensor.view[start : start + len(data)])
        with tensor.lock:
            tensor.left -= len(data)
            if tensor.left:
                return False
        if tensor.sealed:
            self._open_boxes(tensor, tensor.header, 0, tensor.view, tensor.view)
        if self._hashes:
            verify_hashes(tensor.header, tensor.view)
        if self._staging is not None:
            if tensor.sealed:
                tensor.memory.copy_(torch.frombuffer(tensor.view, dtype=torch.uint8))
            tensor.sent = self._staging.sent()
        return True

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
        elif (
            header.chunks is not None
            or self._staging is not None
            or tensor.record.length <= BATCH_BYTES
        ):
            place[:] = data  # else it was received there

    def _parse(self, tensor: Pending, data: memoryview) -> None:
        record = tensor.record
        tensor.header = header = parse_header(
            record, data, encrypted=self._encrypted, source_name=self._source.name
        )
        if header.chunks is not None and record.length > BATCH_BYTES:
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
