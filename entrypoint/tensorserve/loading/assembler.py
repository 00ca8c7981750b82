"""How does a received range become part of a finished tensor?

A header is parsed; sealed bytes are decrypted into the tensor's memory (chunk_decryption.py), plain
ones copied there; a complete part goes to the GPU (part_buffers.py); a complete tensor is compared
with its digest (digest_check.py). A range enters once; one that arrives before its tensor's header
waits in its place, sealed, and enters a second time with the header.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorserve.format import FileKey, TensorHeader
from tensorserve.loading.chunk_decryption import ChunkDecryption
from tensorserve.loading.counters import LoadProgress
from tensorserve.loading.damage_recovery import DamageRecovery
from tensorserve.loading.digest_check import DigestCheck
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.part_buffers import PartBuffers
from tensorserve.loading.pending_tensor import PendingTensor
from tensorserve.loading.span_table import Row
from tensorserve.loading.tensor_headers import TensorHeaders
from tensorserve.sources import Source


class Assembler:
    """Assembles the tensors of one file. Thread-safe: ranges of a tensor arrive in any order."""

    def __init__(
        self,
        source: Source,
        key: FileKey | None,
        progress: LoadProgress,
        *,
        encrypted: bool,
        hashes: bool,
        digests: Mapping[int, bytes] | None = None,
        staging: GpuStaging | None = None,
    ) -> None:
        """With `hashes`, each tensor needs a SHA-256, of its header or, by that one's offset, in
        `digests`. With `staging`, tensors are copied to a device, part by part or as a whole.
        """
        self.headers = TensorHeaders(source, progress, encrypted=encrypted)
        self.buffers = PartBuffers(staging, whole=hashes)
        self._recovery = DamageRecovery(source, key, self.headers, self.buffers)
        self._decryption = ChunkDecryption(
            key, self.buffers, self._recovery, progress, encrypted=encrypted
        )
        self._digests = DigestCheck(self._recovery, digests or {}) if hashes else None

    def take_header(self, tensor: PendingTensor, start: int, data: memoryview) -> bool:
        """Bytes of a tensor's header, from `start` of it on; True when the tensor is complete.

        Raises CorruptError.
        """
        with tensor.lock:
            if not tensor.header_bytes:
                tensor.header_bytes = bytearray(tensor.record.header_length)
            tensor.header_bytes[start : start + len(data)] = data
            tensor.header_bytes_left -= len(data)
            if tensor.header_bytes_left:
                return False
        header = self.headers.parse(tensor.record, tensor.header_bytes)
        if tensor.header_only:
            return True
        with tensor.lock:
            self.buffers.header_came(tensor, header)
            if tensor.record.length and tensor.in_c is None:
                tensor.sealed = self._decryption.memory(tensor, header)
            tensor.header = header
            early, tensor.early = tensor.early, []
        if tensor.in_c is not None:
            finished = self._decryption.ready_in_c(tensor, tensor.in_c, header)
            return self._finished(tensor, finished + 1)
        finished = sum(self._place(tensor, header, a, b, None) for a, b in early)
        return self._finished(tensor, finished + 1)

    def take(
        self, tensor: PendingTensor, start: int, data: memoryview, *, placed: bool = False
    ) -> bool:
        """Bytes of a tensor as they stand in the file, from `start` of it on; True when the tensor
        is complete.

        `data` is within one part, or `placed`: received in its place, and not sealed. It may be
        used again afterwards. Raises CorruptError.
        """
        if placed:
            return self._finished(tensor, len(data))
        stop = start + len(data)
        if tensor.in_c is not None:
            row = self._decryption.put_in_c(tensor.in_c, start, data)
            return self.taken(tensor, row)
        header = tensor.header or self._keep_early(tensor, start, stop, data)
        if header is None:
            return False
        self.buffers.reserve(tensor, start, len(data))
        return self._finished(tensor, self._place(tensor, header, start, stop, data))

    def taken(self, tensor: PendingTensor, row: Row) -> bool:
        """C has put a row's bytes in their place; True when the tensor is complete. It has counted
        them unless a chunk failed, which is read again here. Raises CorruptError.
        """
        if row.failures:
            assert tensor.in_c is not None
            self._parse_header_of_c(tensor)
            stop = tensor.record.length if row.header else row.start + row.length
            self._decryption.failed(tensor, tensor.in_c, row.start, stop)
            return self._finished(tensor, row.finished)
        return bool(row.complete) and self._checked(tensor)

    def expect_header(self, tensor: PendingTensor) -> None:
        """C may take the tensor's header, where nobody asks for its digests."""
        if tensor.in_c is not None and self._digests is None:
            self._decryption.expect_in_c(tensor.record, tensor.in_c)

    def _parse_header_of_c(self, tensor: PendingTensor) -> None:
        """Of a tensor of which something is to be read again."""
        with tensor.lock:
            if tensor.header is None and tensor.in_c is not None and tensor.in_c.head is not None:
                tensor.header = self.headers.parse(tensor.record, tensor.in_c.head)

    def _keep_early(
        self, tensor: PendingTensor, start: int, stop: int, data: memoryview
    ) -> TensorHeader | None:
        """Put bytes in their place, sealed, until the header comes; gives it where it has come."""
        with tensor.lock:
            if tensor.header is None:
                self.buffers.write(tensor, start, data)
                tensor.early.append((start, stop))
            return tensor.header

    def _place(
        self,
        tensor: PendingTensor,
        header: TensorHeader,
        start: int,
        stop: int,
        data: memoryview | None,
    ) -> int:
        """Decrypt bytes [start, stop) of the tensor (copy them, if plain) into its memory.

        `data`: these bytes; None: they are already there, sealed. Returns how many bytes became
        plain text; sealed ones count when their chunk is complete.
        """
        if header.chunks is None:
            if data is not None:
                self.buffers.write(tensor, start, data)
            self.buffers.filled(tensor, start, stop)
            return stop - start
        if tensor.sealed is not None:
            return self._decryption.decrypt_in_c(tensor, tensor.sealed, start, stop, data)
        finished = 0
        for begin, end in self._decryption.decrypt(tensor, header, start, stop, data):
            self.buffers.filled(tensor, begin, end)
            finished += end - begin
        return finished

    def _finished(self, tensor: PendingTensor, count: int) -> bool:
        """`count` more bytes are plain text; True when that was the last of the tensor, which is
        checked then.
        """
        if not count:  # another thread may have brought the last ones since
            return False
        if tensor.in_c is not None:
            return tensor.in_c.count(count) and self._checked(tensor)
        with tensor.lock:
            tensor.bytes_left -= count
            if tensor.bytes_left:
                return False
        return self._checked(tensor)

    def _checked(self, tensor: PendingTensor) -> bool:
        """All of a tensor is plain text."""
        if tensor.header is None and tensor.in_c is not None and tensor.in_c.head is not None:
            self.headers.keep(tensor.record, tensor.in_c.head)
        self._recovery.apply_second_header(tensor)
        if self._digests is not None:
            self._digests.check(tensor)
        self.buffers.complete(tensor)
        return True
