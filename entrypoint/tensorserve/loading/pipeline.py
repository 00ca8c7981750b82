"""The way of the bytes: ranges → host memory → decrypted, authenticated → tensor after tensor.

Threads read ranges ahead, in file order, and decrypt each cipher chunk as soon as it is there; the
consumer takes finished tensors in file order. What is read ahead is bounded by a budget of bytes.
Knows sources and the format, not vLLM.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType

import torch

from tensorserve.format import (
    ChunkedCipher,
    FileKey,
    TagMismatchError,
    TensorHeader,
    TensorRecord,
    open_tensor_chunk,
    parse_header,
    verify_hashes,
)
from tensorserve.loading.progress import LoadProgress
from tensorserve.loading.schedule import Piece, Range, ranges
from tensorserve.sources import Source


@dataclass(frozen=True)
class LoadOptions:
    """How to load. ``ahead_bytes`` bounds the host memory for tensors that are not yet taken."""

    connections: int = 16
    ahead_bytes: int = 1024**3
    verify_hashes: bool = False


@dataclass
class _Pending:
    """One tensor on its way."""

    record: TensorRecord
    memory: torch.Tensor  # uint8, `record.length` bytes
    view: memoryview
    header: TensorHeader | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)  # of the data, as they arrived
    taken: set[int] = field(default_factory=set)  # chunks that some thread decrypts or decrypted
    ready: int = 0  # bytes that are plain and authenticated
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class TensorStream:
    """Iterate over it: (record, CPU tensor of the record's shape and dtype), in file order.

    A tensor is handed out only after every one of its chunks was authenticated. Use it as a context
    manager: leaving it ends all threads, also in the middle. Errors of any thread surface in the
    consumer, as they were raised.
    """

    def __init__(
        self,
        source: Source,
        records: Iterable[TensorRecord],
        *,
        encrypted: bool,
        key: FileKey | None,
        options: LoadOptions,
        progress: LoadProgress,
    ) -> None:
        self._source = source
        self._encrypted = encrypted
        self._key = key
        self._options = options
        self._progress = progress
        records = tuple(records)
        self._todo = ranges(records)
        self._todo_lock = threading.Lock()
        self._order: SimpleQueue[_Pending | None] = SimpleQueue()
        self._pending: dict[int, _Pending] = {}
        self._free = threading.Condition()
        self._ahead = 0
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._left = len(records)
        self._threads = [
            threading.Thread(target=self._work, name=f"tensorserve-load-{n}", daemon=True)
            for n in range(options.connections)
        ]

    def __enter__(self) -> TensorStream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        with self._free:
            self._free.notify_all()
        # A thread in the middle of a read ends with its read: threads are daemons.
        for thread in self._threads:
            thread.join(timeout=1.0)

    def __iter__(self) -> Iterator[tuple[TensorRecord, torch.Tensor]]:
        while self._left:
            pending = self._order.get()
            if pending is None:
                self._raise()
            else:
                while not pending.done.wait(0.1):
                    self._raise()
                self._raise()
                self._left -= 1
                yield pending.record, _shaped(pending.record, pending.memory)
                self._release(pending)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # In the worker threads ------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            scratch = bytearray()
            while not self._stopped.is_set():
                claimed = self._claim()
                if claimed is None:
                    return
                wanted, tensors = claimed
                if len(scratch) < wanted.length:
                    scratch = bytearray(wanted.length)
                self._read(wanted, tensors, memoryview(scratch)[: wanted.length])
        # The error belongs to the consumer, which raises it: also KeyboardInterrupt and the like.
        except BaseException as error:  # noqa: BLE001
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._stopped.set()
        self._order.put(None)
        with self._free:
            self._free.notify_all()

    def _claim(self) -> tuple[Range, list[_Pending]] | None:
        """The next range in file order, with memory for the tensors that begin in it."""
        with self._todo_lock:
            wanted = next(self._todo, None)
            if wanted is None:
                return None
            self._admit([piece.record for piece in wanted.pieces if piece.start == 0])
            tensors = []
            for piece in wanted.pieces:
                tensors.append(self._pending[piece.record.header_offset])
                if piece.stop == piece.record.length:
                    del self._pending[piece.record.header_offset]
            return wanted, tensors

    def _admit(self, records: list[TensorRecord]) -> None:
        """Wait for room, then set the tensors up, all those of a range or none.

        Every tensor admitted before is claimed to its end by then, so the consumer can always take
        one and make room. Where nothing is ahead, any size is let in.
        """
        needed = sum(record.length for record in records)
        with self._free:
            while (
                needed
                and self._ahead
                and self._ahead + needed > self._options.ahead_bytes
                and not self._stopped.is_set()
            ):
                self._free.wait()
            self._ahead += needed
        for record in records:
            memory = torch.empty(record.length, dtype=torch.uint8)
            view = memory.numpy().data if record.length else memoryview(bytearray())
            pending = _Pending(record, memory, view)
            self._pending[record.header_offset] = pending
            self._order.put(pending)

    def _release(self, pending: _Pending) -> None:
        with self._free:
            self._ahead -= pending.record.length
            self._free.notify_all()

    def _read(self, wanted: Range, tensors: list[_Pending], scratch: memoryview) -> None:
        piece, tensor = wanted.pieces[0], tensors[0]
        started = time.monotonic()
        if len(wanted.pieces) == 1 and piece.start > 0:
            # The middle of a large tensor: straight to where it belongs.
            self._source.read_into(wanted.offset, tensor.view[piece.start : piece.stop])
            self._count_fetch(wanted, started)
            self._arrived(tensor, piece)
            return
        self._source.read_into(wanted.offset, scratch)
        self._count_fetch(wanted, started)
        for piece, tensor in zip(wanted.pieces, tensors, strict=True):
            record = piece.record
            begin = record.header_offset - wanted.offset
            data = record.data_offset - wanted.offset
            tensor.header = parse_header(
                record,
                scratch[begin:data],
                encrypted=self._encrypted,
                source_name=self._source.name,
            )
            tensor.view[: piece.stop] = scratch[data : data + piece.stop]
            self._arrived(tensor, piece)

    def _count_fetch(self, wanted: Range, started: float) -> None:
        count = sum(piece.stop - piece.start for piece in wanted.pieces)
        self._progress.stage("fetch", count, time.monotonic() - started)

    def _arrived(self, tensor: _Pending, piece: Piece) -> None:
        """Decrypt what can be decrypted now; finish the tensor when nothing is missing."""
        with tensor.lock:
            tensor.spans = _merged([*tensor.spans, (piece.start, piece.stop)])
            header = tensor.header
            if header is None:
                return  # whoever brings the header takes these bytes too
            if header.chunks is None:
                tensor.ready = sum(stop - start for start, stop in tensor.spans)
                mine = []
            else:
                mine = _take_whole_chunks(tensor, header.chunks)
        if header.chunks is not None and mine:
            assert self._key is not None
            key = self._key.for_header(header)
            started = time.monotonic()
            count = 0
            for index in mine:
                start, stop = header.chunks.chunk_bounds(index, tensor.record.length)
                self._decrypt(tensor, header, key, index, start, stop)
                count += stop - start
            self._progress.stage("decrypt", count, time.monotonic() - started)
            with tensor.lock:
                tensor.ready += count
        if tensor.ready == tensor.record.length and not tensor.done.is_set():
            if self._options.verify_hashes:
                verify_hashes(header, tensor.view)
            tensor.done.set()

    def _decrypt(
        self, tensor: _Pending, header: TensorHeader, key: bytes, index: int, start: int, stop: int
    ) -> None:
        """Open one chunk in place; where its tag does not fit, read it once more first."""
        chunk = tensor.view[start:stop]
        try:
            open_tensor_chunk(header, key, index, chunk, chunk)
        except TagMismatchError:
            # Damaged on the wire, or at rest? libsodium checks before it writes.
            self._progress.retry("corrupt")
            self._source.read_into(tensor.record.data_offset + start, chunk)
            open_tensor_chunk(header, key, index, chunk, chunk)


def _take_whole_chunks(tensor: _Pending, chunks: ChunkedCipher) -> list[int]:
    """Chunks whose bytes are all there and which no thread has taken yet."""
    mine = []
    for index in range(chunks.count):
        if index in tensor.taken:
            continue
        start, stop = chunks.chunk_bounds(index, tensor.record.length)
        if any(a <= start and stop <= b for a, b in tensor.spans):
            tensor.taken.add(index)
            mine.append(index)
    return mine


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: deque[tuple[int, int]] = deque()
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return list(merged)


def _shaped(record: TensorRecord, memory: torch.Tensor) -> torch.Tensor:
    dtype = getattr(torch, record.dtype)
    if record.is_meta:
        # tensorizer gives zeros for a tensor that was on the meta device when it was written.
        return torch.zeros(record.shape, dtype=dtype)
    return memory.view(dtype).reshape(record.shape)


def report_every(seconds: float, report: Callable[[], None]) -> Callable[[], None]:
    """Call `report` every so often until the returned function is called (and once more then)."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            report()

    thread = threading.Thread(target=run, name="tensorserve-progress", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()
        report()

    return end
