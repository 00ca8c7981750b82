"""How do sealed bytes become plain text in the tensor's memory, in whatever order they arrive?

A chunk that arrives as a whole is authenticated and decrypted in one call. One that arrives in
several ranges is decrypted range by range, while each is in the processor's cache, and its tag is
compared at the end (crypto/incremental.py). What cannot be decrypted yet is in its place, still
sealed: ranges that came before the header, parts of the cipher's blocks, and all ranges where the
cipher (libsodium's) needs the whole chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from tensorserve.format import (
    STRIP_ALIGNMENT,
    ChunkedCipher,
    FileKey,
    StripOpener,
    TagMismatchError,
    TensorHeader,
    TensorRecord,
    fixed_fields,
    open_tensor_chunk,
    opens_strips,
)
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.damage_recovery import DamageRecovery
from tensorserve.loading.part_buffers import PartBuffers
from tensorserve.loading.pending_tensor import PartialChunk, PendingTensor
from tensorserve.loading.ranges import joined
from tensorserve.loading.span_table import Row, TensorMemory, functions
from tensorserve.telemetry.names import Stage


class ChunkDecryption:
    """Decrypts the tensors of one file. Thread-safe."""

    def __init__(
        self,
        key: FileKey | None,
        buffers: PartBuffers,
        recovery: DamageRecovery,
        progress: LoadProgress,
        *,
        encrypted: bool,
    ) -> None:
        self._key = key
        self._buffers = buffers
        self._recovery = recovery
        self._progress = progress
        # Asked for sealed files alone: plain ones are served without libsodium, too.
        self._encrypted = encrypted
        self._incremental = encrypted and opens_strips()

    def memory(self, tensor: PendingTensor, header: TensorHeader) -> TensorMemory | None:
        """The tensor's memory for C, which opens its chunks; None where Python does."""
        if header.chunks is None or functions() is None or self._buffers.in_parts(tensor):
            return None
        return TensorMemory(tensor.view, header, self._key_for(header))

    def decrypt_in_c(
        self,
        tensor: PendingTensor,
        memory: TensorMemory,
        start: int,
        stop: int,
        data: memoryview | None,
    ) -> int:
        """As `decrypt`, in one call: gives how many bytes are plain text because of it."""
        began = time.monotonic()
        finished, failures = memory.take(start, data, stop - start)
        if failures:
            self.failed(tensor, memory, start, stop)
        self._progress.stage(Stage.DECRYPT, stop - start, time.monotonic() - began)
        return finished

    def put_in_c(self, memory: TensorMemory, start: int, data: memoryview) -> Row:
        """Put bytes that Python has in their place; see `TensorMemory.put`."""
        began = time.monotonic()
        row = memory.put(start, data)
        if memory.is_sealed and not row.early:
            self._progress.stage(Stage.DECRYPT, len(data), time.monotonic() - began)
        return row

    def ready_in_c(self, tensor: PendingTensor, memory: TensorMemory, header: TensorHeader) -> int:
        """The header has come: open what came before it; gives how many bytes are plain text
        because of it.
        """
        began = time.monotonic()
        key = None if header.chunks is None else self._key_for(header)
        finished, opened, failures = memory.ready(header, key)
        if failures:
            self.failed(tensor, memory, 0, tensor.record.length)
        if opened:
            self._progress.stage(Stage.DECRYPT, opened, time.monotonic() - began)
        return finished

    def expect_in_c(self, record: TensorRecord, memory: TensorMemory) -> None:
        """C may take the tensor's header, unless the key depends on what stands there."""
        key = None
        if self._encrypted:
            assert self._key is not None
            key = self._key.of_all_headers
            if key is None:
                return
        memory.expect(fixed_fields(record), record.header_length, key)

    def failed(self, tensor: PendingTensor, memory: TensorMemory, start: int, stop: int) -> None:
        """Read the chunks of [start, stop) again that did not authenticate in C."""
        # Another thread may find those of this one: its bytes count once they are read.
        with tensor.lock:
            for index in memory.failed(start, stop):
                self._recovery.chunk_failed(tensor, index)

    def decrypt(
        self,
        tensor: PendingTensor,
        header: TensorHeader,
        start: int,
        stop: int,
        data: memoryview | None,
    ) -> Iterator[tuple[int, int]]:
        """Take bytes [start, stop) of a sealed tensor; yields (begin, end) of each chunk that is
        plain text in its place by then.

        `data`: these bytes; None where they stand in their place already, sealed. A chunk that
        does not authenticate is read again. Raises CorruptError where that fails too.
        """
        chunks = header.chunks
        assert chunks is not None
        for index, begin, end in _chunks_within(chunks, tensor.record.length, start, stop):
            began = time.monotonic()
            first, last = max(start, begin), min(stop, end)
            sealed = None if data is None else data[first - start : last - start]
            try:
                if sealed is not None and (first, last) == (begin, end):
                    out = self._buffers.fresh_place(tensor, begin, end)
                    open_tensor_chunk(header, self._key_for(header), index, sealed, out)
                    whole = True
                else:
                    within = (first - begin, last - begin)
                    whole = self._add(tensor, header, index, within, sealed)
            except TagMismatchError:
                self._recovery.chunk_failed(tensor, index)
                whole = True
            self._progress.stage(Stage.DECRYPT, last - first, time.monotonic() - began)
            if whole:
                yield begin, end

    def _add(
        self,
        tensor: PendingTensor,
        header: TensorHeader,
        index: int,
        within: tuple[int, int],
        data: memoryview | None,
    ) -> bool:
        """Some of a chunk has arrived; True when that was the last of it, and it is plain text.

        `within`: (start, stop) in the chunk. Raises TagMismatchError.
        """
        chunks = header.chunks
        assert chunks is not None
        begin, end = chunks.chunk_bounds(index, tensor.record.length)
        with tensor.lock:
            chunk = tensor.chunks.get(index)
            if chunk is None:
                chunk = tensor.chunks[index] = PartialChunk(
                    end - begin, self._strips(header, chunks, index)
                )
        start, stop = within
        first, last = stop, stop
        if data is not None and chunk.strips is not None:
            # Whole blocks of the cipher only; the bytes around them wait for the rest of theirs.
            first = min(-(-start // STRIP_ALIGNMENT) * STRIP_ALIGNMENT, stop)
            last = max(first, stop // STRIP_ALIGNMENT * STRIP_ALIGNMENT)
            if begin + stop == end:
                last = stop
            if first < last:
                out = self._buffers.fresh_place(tensor, begin + first, begin + last)
                chunk.strips.open(first, data[first - start : last - start], out)
        waiting = [(start, first), (last, stop)]
        if data is not None:
            for a, b in waiting:
                self._buffers.write(tensor, begin + a, data[a - start : b - start])
        with tensor.lock:
            chunk.sealed += [(a, b) for a, b in waiting if a < b]
            chunk.bytes_left -= stop - start
            if chunk.bytes_left:
                return False
            del tensor.chunks[index]
        self._finish(tensor, header, index, chunk)
        return True

    def _strips(
        self, header: TensorHeader, chunks: ChunkedCipher, index: int
    ) -> StripOpener | None:
        if not self._incremental:
            return None
        return StripOpener(self._key_for(header), chunks.chunk_nonce(index))

    def _finish(
        self, tensor: PendingTensor, header: TensorHeader, index: int, chunk: PartialChunk
    ) -> None:
        """All of a chunk is in its place: decrypt what is still sealed, and compare the tag."""
        assert header.chunks is not None
        begin, end = header.chunks.chunk_bounds(index, tensor.record.length)
        if chunk.strips is None:
            here = self._buffers.place(tensor, begin, end)
            open_tensor_chunk(header, self._key_for(header), index, here, here)
            return
        for start, stop in joined(sorted(chunk.sealed)):
            here = self._buffers.place(tensor, begin + start, begin + stop)
            chunk.strips.open(start, here, here)
        chunk.strips.check(header.chunks.chunk_tag(index))

    def _key_for(self, header: TensorHeader) -> bytes:
        assert self._key is not None
        return self._key.for_header(header)


def _chunks_within(
    chunks: ChunkedCipher, length: int, start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """(index, begin, end) of the chunks that bytes [start, stop) of a tensor touch."""
    size = length if chunks.count == 1 else chunks.chunk_size
    for index in range(start // size, -(-stop // size)):
        yield index, *chunks.chunk_bounds(index, length)
