"""From what stands in the file to a tensor's own bytes: decrypted, authenticated, in their place.

Sealed bytes come in strips, in any order. A strip is opened where it belongs while it is still in
the processor's cache; when a chunk's last one is there, its tag is compared. What cannot be opened
yet (its header is on its way, or the cipher wants whole chunks) waits in its place, still sealed.
What looks damaged is read once more: on the wire, or at rest? What comes a second time is believed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from tensorserve.errors import CorruptError
from tensorserve.format import (
    STRIP_ALIGNMENT,
    ChunkedCipher,
    FileKey,
    StripOpener,
    TagMismatchError,
    TensorHeader,
    TensorRecord,
    open_tensor_chunk,
    opens_strips,
    parse_header,
    verify_hashes,
)
from tensorserve.linux import populate
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import PART_BYTES
from tensorserve.loading.staging import Staging
from tensorserve.sources import Source


@dataclass(eq=False)
class _Chunk:
    """A sealed chunk on its way."""

    left: int  # bytes
    strips: StripOpener | None
    """None where the cipher wants it whole."""
    sealed: list[tuple[int, int]] = field(default_factory=list)
    """From where to where it stands in its place, still sealed."""


@dataclass(eq=False)
class _Part:
    """PART_BYTES of a tensor that go on to a device: host memory in which they come together."""

    memory: memoryview
    slot: torch.Tensor | None
    """Whose memory it is; None: ordinary memory, to be copied into a slot when it is whole."""
    left: int  # bytes


@dataclass(eq=False)
class Pending:
    """One tensor on its way."""

    record: TensorRecord
    memory: torch.Tensor  # uint8, of the record's length; where it is staged, on the device
    view: memoryview  # of the memory; of host memory, or empty, where it is staged
    budget: int  # bytes that it takes of the room for tensors ahead of the consumer
    gathered: int = 0
    """Where it is staged: bytes of host memory in which it comes together as a whole."""
    staged: bool = True
    """Whether it goes on to the device, where there is a `Staging`."""
    header_only: bool = False
    """Whether nothing but the header is wanted, for the digest of all headers."""
    header: TensorHeader | None = None
    header_bytes: bytearray = field(default_factory=bytearray)
    header_left: int = field(init=False)
    early: list[tuple[int, int]] = field(default_factory=list)
    """From where to where it came before its header."""
    chunks: dict[int, _Chunk] = field(default_factory=dict)
    parts: dict[int, _Part] = field(default_factory=dict)
    left: int = field(init=False)
    """Bytes that are not open in their place yet, and one for the header."""
    true_header: TensorHeader | None = None
    """Read a second time, and another than the first: what differs has to be opened again."""
    failed: set[int] = field(default_factory=set)
    """Chunks that did not open under the first header, where there is another one."""
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)
    sent: object | None = None  # where it is staged: what to wait for on the device

    def __post_init__(self) -> None:
        self.left = 1 if self.header_only else self.record.length + 1
        self.header_left = self.record.header_length

    def hand_over(self) -> None:
        """Let go of its memory, the consumer's now: a job that goes on may still name it."""
        self.memory, self.view = torch.empty(0), memoryview(b"")


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
        digests: Mapping[int, bytes] | None = None,
        staging: Staging | None = None,
    ) -> None:
        """With `hashes`, each tensor needs a SHA-256, of its header or, by that one's offset, in
        `digests`. With `staging`, tensors go on to a device, part by part or once they are whole.
        """
        self._staging = staging
        self._crosses = False
        self._source = source
        self._key = key
        self._progress = progress
        self._encrypted = encrypted
        self._hashes = hashes
        self._digests = digests or {}
        self._strips = encrypted and opens_strips()
        self.headers: dict[int, bytes] = {}
        """{offset: header}, as they come."""
        # Memory of parts, to be used again: fresh memory costs as much as decryption.
        self._spare: deque[memoryview] = deque()

    def gathers(self, record: TensorRecord) -> bool:
        """Whether a tensor that is staged should come together in host memory as a whole.

        A file's chunks are of one size: where one tensor's are not cut as parts are, others' are
        not either.
        """
        return self._hashes or (self._crosses and record.length > PART_BYTES)

    # What comes ----------------------------------------------------------------------------------

    def take_header(self, tensor: Pending, start: int, data: memoryview) -> bool:
        """Bytes of a tensor's header, from `start` of it on; True when the tensor is complete.

        Raises CorruptError.
        """
        length = tensor.record.header_length
        with tensor.lock:
            if not tensor.header_bytes:
                tensor.header_bytes = bytearray(length)
            tensor.header_bytes[start : start + len(data)] = data
            tensor.header_left -= len(data)
            if tensor.header_left:
                return False
        try:
            header = self._parse(tensor.record, tensor.header_bytes)
        except CorruptError:
            header, _ = self._read_header_again(tensor.record)
        if tensor.header_only:
            return True
        with tensor.lock:
            if self._staging is not None and not tensor.view and _crosses_parts(header):
                self._crosses = True
                self._to_one_place(tensor)
            tensor.header = header
            early, tensor.early = tensor.early, []
        for start, stop in early:
            self._settle(tensor, header, start, stop, None)
        return self._passed(tensor, 1)

    def take(self, tensor: Pending, start: int, data: memoryview, *, placed: bool = False) -> bool:
        """What stands in the file from `start` of the tensor on; True when it is complete.

        `data` is within one part (PART_BYTES), or `placed`: received where it belongs, and not
        sealed. Raises CorruptError.
        """
        stop = start + len(data)
        if placed:
            return self._passed(tensor, len(data))
        header = tensor.header
        if header is None:
            with tensor.lock:
                header = tensor.header
                if header is None:
                    self._write(tensor, start, data)
                    tensor.early.append((start, stop))
                    return False
        if self._staging is not None and not tensor.view and _is_part(tensor.record, start, stop):
            self._take_slot(self._staging, tensor, start, len(data))
        return self._settle(tensor, header, start, stop, data)

    def _settle(
        self,
        tensor: Pending,
        header: TensorHeader,
        start: int,
        stop: int,
        data: memoryview | None,
    ) -> bool:
        """Bytes [start, stop) are there: `data`, or in their place, as they came; True when the
        tensor is complete.
        """
        if header.chunks is None:
            if data is not None:
                self._write(tensor, start, data)
            return self._arrived(tensor, start, stop)
        complete = False
        for index, begin, end in _chunks_within(header.chunks, tensor.record.length, start, stop):
            a, b = max(start, begin), min(stop, end)
            box = None if data is None else data[a - start : b - start]
            if box is not None and (a, b) == (begin, end):
                self._open_whole(tensor, header, index, box)
            elif not self._take_strip(tensor, header, index, (a - begin, b - begin), box):
                continue
            complete = self._arrived(tensor, begin, end) or complete
        return complete

    # Sealed chunks -------------------------------------------------------------------------------

    def _open_whole(
        self, tensor: Pending, header: TensorHeader, index: int, sealed: memoryview
    ) -> None:
        """A chunk that came at once."""
        began = time.monotonic()
        assert header.chunks is not None
        begin, end = header.chunks.chunk_bounds(index, tensor.record.length)
        out = self._fresh_place(tensor, begin, end)
        try:
            open_tensor_chunk(header, self._key_for(header), index, sealed, out)
        except TagMismatchError:
            self._open_again(tensor, index)
        self._progress.stage("decrypt", len(sealed), time.monotonic() - began)

    def _take_strip(
        self,
        tensor: Pending,
        header: TensorHeader,
        index: int,
        at: tuple[int, int],
        data: memoryview | None,
    ) -> bool:
        """Some of a chunk is there; True when its last strip was, and it is open."""
        began = time.monotonic()
        chunks = header.chunks
        assert chunks is not None
        begin, end = chunks.chunk_bounds(index, tensor.record.length)
        with tensor.lock:
            chunk = tensor.chunks.get(index)
            if chunk is None:
                strips = (
                    StripOpener(self._key_for(header), chunks.chunk_nonce(index))
                    if self._strips
                    else None
                )
                chunk = tensor.chunks[index] = _Chunk(end - begin, strips)
        a, b = at
        first, last = b, b
        if data is not None and chunk.strips is not None:
            # Whole blocks of the cipher. What is left over waits for its other half.
            first = min(-(-a // STRIP_ALIGNMENT) * STRIP_ALIGNMENT, b)
            last = b if begin + b == end else max(first, b // STRIP_ALIGNMENT * STRIP_ALIGNMENT)
            if first < last:
                out = self._fresh_place(tensor, begin + first, begin + last)
                chunk.strips.open(first, data[first - a : last - a], out)
        waiting = [(a, first), (last, b)]
        if data is not None:
            for start, stop in waiting:
                self._write(tensor, begin + start, data[start - a : stop - a])
        with tensor.lock:
            chunk.sealed += [(start, stop) for start, stop in waiting if start < stop]
            chunk.left -= b - a
            whole = not chunk.left
            if whole:
                del tensor.chunks[index]
        if whole:
            self._finish(tensor, header, index, chunk)
        self._progress.stage("decrypt", b - a, time.monotonic() - began)
        return whole

    def _finish(self, tensor: Pending, header: TensorHeader, index: int, chunk: _Chunk) -> None:
        """All of a chunk is in its place, open or sealed: open the rest, compare the tag."""
        assert header.chunks is not None
        begin, end = header.chunks.chunk_bounds(index, tensor.record.length)
        try:
            if chunk.strips is None:
                here = self._place(tensor, begin, end)
                open_tensor_chunk(header, self._key_for(header), index, here, here)
                return
            for start, stop in _merged(chunk.sealed):
                here = self._place(tensor, begin + start, begin + stop)
                chunk.strips.open(start, here, here)
            chunk.strips.check(header.chunks.chunk_tag(index))
        except TagMismatchError:
            self._open_again(tensor, index)

    def _open_again(self, tensor: Pending, index: int) -> None:
        """Nonce and tag may be what was damaged, so the header is read anew as well.

        Where another header comes, this chunk waits until all have come: others that the first
        header opened may be of an older version, sealed with the same key (`_open_under`).
        """
        with tensor.lock:
            if tensor.true_header is None:
                header, same = self._read_header_again(tensor.record)
                if not same:
                    tensor.true_header = header
            if tensor.true_header is not None:
                tensor.failed.add(index)
                return
        self._read_chunk(tensor, header, index)

    def _read_chunk(self, tensor: Pending, header: TensorHeader, index: int) -> tuple[int, int]:
        """Read a chunk past all that was read before, and open it; gives where it stands."""
        assert header.chunks is not None
        begin, end = header.chunks.chunk_bounds(index, tensor.record.length)
        here = self._place(tensor, begin, end)
        self._source.read_again(tensor.record.data_offset + begin, here)
        open_tensor_chunk(header, self._key_for(header), index, here, here)
        return begin, end

    def _open_under(self, tensor: Pending, header: TensorHeader) -> bool:
        """All that was opened under another header and differs in this one is read and opened
        again. One thread, a chunk at a time: it is rare.
        """
        again = self._differing(tensor, header)
        tensor.header, tensor.true_header = header, None
        assert header.chunks is not None
        if self._staging is not None and not tensor.view and _crosses_parts(header):
            # What is on its way of it comes first: one stream has both.
            self._to_one_place(tensor)
        bounds = [header.chunks.chunk_bounds(index, tensor.record.length) for index in again]
        tensor.left = sum(end - begin for begin, end in bounds)
        complete = False
        for index in again:
            complete = self._arrived(tensor, *self._read_chunk(tensor, header, index))
        return complete

    def _differing(self, tensor: Pending, header: TensorHeader) -> list[int]:
        """The chunks that the tensor's header so far does not vouch for in the way `header` does.

        A chunk that opened under the same key, nonce and tag is the same chunk.
        """
        chunks, before = header.chunks, tensor.header
        assert chunks is not None
        assert before is not None
        every = list(range(chunks.count))
        if before.chunks is None or _cut(before) != _cut(header):
            return every
        found = {
            index
            for index in every
            if index in tensor.failed
            or before.chunks.chunk_tag(index) != chunks.chunk_tag(index)
            or before.chunks.chunk_nonce(index) != chunks.chunk_nonce(index)
        }
        if self._staging is None or tensor.view or chunks.count == 1:
            return sorted(found)
        # A part goes to the device as a whole.
        each = PART_BYTES // chunks.chunk_size
        parts = {index // each for index in found}
        return [index for index in every if index // each in parts]

    def _key_for(self, header: TensorHeader) -> bytes:
        assert self._key is not None
        return self._key.for_header(header)

    # Where it belongs ----------------------------------------------------------------------------

    def _write(self, tensor: Pending, start: int, data: memoryview) -> None:
        if len(data):
            self._fresh_place(tensor, start, start + len(data))[:] = data

    def _fresh_place(self, tensor: Pending, start: int, stop: int) -> memoryview:
        """`_place` of what is written for the first time: there may be no pages yet."""
        place = self._place(tensor, start, stop)
        if self._staging is None or tensor.view:  # a slot is page-locked, and has its pages
            populate(place)
        return place

    def _place(self, tensor: Pending, start: int, stop: int) -> memoryview:
        """Host memory of bytes [start, stop): the tensor's own, or of a part that will be sent."""
        if self._staging is None or tensor.view:
            return tensor.view[start:stop]
        number = start // PART_BYTES
        begin = number * PART_BYTES
        with tensor.lock:
            if number not in tensor.parts:
                length = min(PART_BYTES, tensor.record.length - begin)
                tensor.parts[number] = self._new_part(self._staging, length)
            part = tensor.parts[number]
        return part.memory[start - begin : stop - begin]

    def _take_slot(self, staging: Staging, tensor: Pending, start: int, length: int) -> None:
        """All of a part is in hand: it waits for nobody, and comes together where it is sent from.

        Outside of the tensor's lock: others need it to free their slots.
        """
        slot = staging.take()
        with tensor.lock:
            part = _Part(slot.numpy().data[:length], slot, length)
            tensor.parts[start // PART_BYTES] = part

    def _new_part(self, staging: Staging, length: int) -> _Part:
        """For a part that comes bit by bit."""
        slot = staging.take_early()
        if slot is not None:
            return _Part(slot.numpy().data[:length], slot, length)
        if length == PART_BYTES:
            with suppress(IndexError):
                return _Part(self._spare.pop(), None, length)
        memory = memoryview(bytearray(length))
        populate(memory)
        return _Part(memory, None, length)

    def _to_one_place(self, tensor: Pending) -> None:
        """Its chunks are not cut as parts are: it goes to the device as a whole."""
        view = memoryview(bytearray(tensor.record.length))
        for start, stop in tensor.early:
            view[start:stop] = self._place(tensor, start, stop)
        assert self._staging is not None
        for part in tensor.parts.values():
            if part.slot is not None:
                self._staging.give_back(part.slot)
        tensor.parts.clear()
        tensor.view = view

    def _arrived(self, tensor: Pending, start: int, stop: int) -> bool:
        """Bytes [start, stop) are in their place and open; True when the tensor is complete."""
        if self._staging is not None and not tensor.view:
            number = start // PART_BYTES
            with tensor.lock:
                part = tensor.parts[number]
                part.left -= stop - start
                whole = not part.left
                if whole:
                    del tensor.parts[number]
            if whole:
                self._send(self._staging, tensor, number * PART_BYTES, part)
        return self._passed(tensor, stop - start)

    def _send(self, staging: Staging, tensor: Pending, begin: int, part: _Part) -> None:
        slot, length = part.slot, len(part.memory)
        if slot is None:
            slot = staging.take()
            slot.numpy().data[:length] = part.memory
            if length == PART_BYTES:
                self._spare.append(part.memory)
        staging.send(slot, tensor.memory[begin : begin + length])

    def _passed(self, tensor: Pending, count: int) -> bool:
        """So much less is to come; True when that was the last of it."""
        with tensor.lock:
            tensor.left -= count
            if tensor.left:
                return False
        if tensor.true_header is not None:
            return self._open_under(tensor, tensor.true_header)
        if self._hashes:
            self._verify(tensor)
        if self._staging is not None and tensor.staged:
            self._staging.send_all(tensor.view, tensor.memory)
            tensor.sent = self._staging.sent()
        return True

    def _verify(self, tensor: Pending) -> None:
        """Raises CorruptError where the hashes do not fit a second time either."""
        assert tensor.header is not None
        expected = self._digests.get(tensor.record.header_offset)
        try:
            verify_hashes(tensor.header, tensor.view, expected)
        except CorruptError:
            tensor.header, same = self._read_header_again(tensor.record)
            if tensor.header.chunks is None:
                self._source.read_again(tensor.record.data_offset, tensor.view)
            elif not same:  # else the tags have vouched for the bytes
                for index in range(tensor.header.chunks.count):
                    self._read_chunk(tensor, tensor.header, index)
            verify_hashes(tensor.header, tensor.view, expected)

    # Headers -------------------------------------------------------------------------------------

    def _parse(self, record: TensorRecord, data: bytes | bytearray) -> TensorHeader:
        header = parse_header(
            record, memoryview(data), encrypted=self._encrypted, source_name=self._source.name
        )
        self.headers[record.header_offset] = bytes(data)
        return header

    def _read_header_again(self, record: TensorRecord) -> tuple[TensorHeader, bool]:
        """What stands in the file now, and whether it is, byte for byte, what was read before."""
        self._progress.retry("corrupt")
        before = self.headers.get(record.header_offset)
        data = bytearray(record.header_length)
        self._source.read_again(record.header_offset, memoryview(data))
        return self._parse(record, data), bytes(data) == before


def _chunks_within(
    chunks: ChunkedCipher, length: int, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """(index, begin, end) of the chunks that bytes [start, stop) of a tensor touch."""
    size = length if chunks.count == 1 else chunks.chunk_size
    for index in range(start // size, -(-stop // size)):
        yield index, *chunks.chunk_bounds(index, length)


def _cut(header: TensorHeader) -> tuple[object, ...]:
    """Where the tensor is cut into chunks, and with which key they are sealed."""
    assert header.chunks is not None
    count = header.chunks.count
    return count, 0 if count == 1 else header.chunks.chunk_size, header.key_derivation


def _is_part(record: TensorRecord, start: int, stop: int) -> bool:
    """Whether bytes [start, stop) of a tensor are one part of it, and all of that."""
    return start % PART_BYTES == 0 and stop == min(start + PART_BYTES, record.length)


def _crosses_parts(header: TensorHeader) -> bool:
    """Whether a chunk may stand in two parts."""
    chunks, length = header.chunks, header.record.length
    if chunks is None or length <= PART_BYTES:
        return False
    return bool(PART_BYTES % (length if chunks.count == 1 else chunks.chunk_size))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours put together."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged
