"""What is read a second time because it looks damaged, and how is it put in its place?

Damage on the way is gone in a second read; damage in the file is not. What a second read gives is
final: it is authenticated once more, and its failure ends the load.
"""

from __future__ import annotations

from tensorserve.format import FileKey, TensorHeader, open_tensor_chunk
from tensorserve.loading.part_buffers import PartBuffers
from tensorserve.loading.pending_tensor import PendingTensor
from tensorserve.loading.tensor_headers import TensorHeaders
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Source


class DamageRecovery:
    """Second reads of one load. Thread-safe. All methods raise CorruptError where a second read
    fails as well, and the source's errors.
    """

    def __init__(
        self, source: Source, key: FileKey | None, headers: TensorHeaders, buffers: PartBuffers
    ) -> None:
        self._source = source
        self._key = key
        self._headers = headers
        self._buffers = buffers

    def chunk_failed(self, tensor: PendingTensor, index: int) -> None:
        """Read a chunk again that did not authenticate, and its header: nonce and tag may be what
        was damaged.

        Where the second header is another one, the chunk is only noted. Chunks that the first
        header opened may be of an older version of the file, sealed with the same key, so all
        that differ are read again when the tensor has arrived (`apply_second_header`).
        """
        with tensor.lock:
            if tensor.second_header is None:
                header, same = self._headers.read_again(tensor.record)
                if not same:
                    tensor.second_header = header
            if tensor.second_header is not None:
                tensor.failed_chunks.add(index)
                return
        self._read_chunk(tensor, header, index)

    def apply_second_header(self, tensor: PendingTensor) -> None:
        """Read and open again, in this thread, the chunks whose sealing differs in the second
        header.

        The tensor has arrived as a whole. Does nothing where there is no second header.
        """
        header = tensor.second_header
        if header is None:
            return
        indices = self._differing(tensor, header)
        tensor.header, tensor.second_header = header, None
        with tensor.lock:
            # Parts that are being copied come first: one stream has both copies.
            self._buffers.header_came(tensor, header)
        for index in indices:
            self._buffers.filled(tensor, *self._read_chunk(tensor, header, index))

    def tensor_failed(self, tensor: PendingTensor) -> None:
        """Read a tensor again whose digest differs, and its header. It is whole in host memory."""
        header, same = self._headers.read_again(tensor.record)
        tensor.header = header
        if header.chunks is None:
            self._source.read_again(tensor.record.data_offset, tensor.view)
        elif not same:  # under the same header, the tags have authenticated the bytes
            for index in range(header.chunks.count):
                self._read_chunk(tensor, header, index)

    def _read_chunk(
        self, tensor: PendingTensor, header: TensorHeader, index: int
    ) -> tuple[int, int]:
        """Read a chunk, past all caches, and open it in its place; gives its (begin, end)."""
        assert header.chunks is not None
        assert self._key is not None
        begin, end = header.chunks.chunk_bounds(index, tensor.record.length)
        here = self._buffers.place(tensor, begin, end)
        self._source.read_again(tensor.record.data_offset + begin, here)
        open_tensor_chunk(header, self._key.for_header(header), index, here, here)
        return begin, end

    def _differing(self, tensor: PendingTensor, header: TensorHeader) -> list[int]:
        """The chunks whose sealing differs between the first header and `header`.

        A chunk that authenticated under the same key, nonce and tag is the same chunk.
        """
        chunks, first = header.chunks, tensor.header
        assert chunks is not None
        assert first is not None
        every = list(range(chunks.count))
        if first.chunks is None or _sealing(first) != _sealing(header):
            return every
        found = {
            index
            for index in every
            if index in tensor.failed_chunks
            or first.chunks.chunk_tag(index) != chunks.chunk_tag(index)
            or first.chunks.chunk_nonce(index) != chunks.chunk_nonce(index)
        }
        if not self._buffers.in_parts(tensor) or chunks.count == 1:
            return sorted(found)
        # A part is copied to the device as a whole.
        per_part = DEFAULTS.part_bytes // chunks.chunk_size
        parts = {index // per_part for index in found}
        return [index for index in every if index // per_part in parts]


def _sealing(header: TensorHeader) -> tuple[object, ...]:
    """How the tensor is cut into chunks, and from what their key is derived."""
    assert header.chunks is not None
    count = header.chunks.count
    return count, 0 if count == 1 else header.chunks.chunk_size, header.key_derivation
