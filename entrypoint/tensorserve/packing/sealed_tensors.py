"""How are the tensors of an encrypted file read in plain text, piece by piece, to be sealed anew?

Every chunk is authenticated, and every tensor is compared with its digest in the old manifest when
its last piece is read: what is sealed anew is what the old key's owner packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorserve.bundle.layout import loadable
from tensorserve.bundle.tensors_file import OpenTensors
from tensorserve.crypto.secretbox import TagMismatchError
from tensorserve.format import (
    HashCheck,
    TensorHeader,
    TensorRecord,
    TensorSpec,
    open_tensor_chunk,
    read_header,
)
from tensorserve.packing.tensor_source import TensorsSource


def from_sealed(opened: OpenTensors, digests: tuple[bytes, ...]) -> TensorsSource:
    """The tensors of an open encrypted file. `digests` are the manifest's, in file order.

    Raises CorruptError for a file that no start loads. Reading raises CorruptError for damage, and
    the source's errors.
    """
    loadable(opened.index)
    records = opened.index.tensors

    @contextmanager
    def reading() -> Iterator[Callable[[str, int, memoryview], None]]:
        yield _Reader(opened, dict(zip((r.name for r in records), digests, strict=True))).read

    return TensorsSource(
        tuple(TensorSpec(r.name, r.dtype, r.shape, r.kind) for r in records), reading
    )


@dataclass
class _Tensor:
    """A tensor of which not all has been read yet."""

    header: TensorHeader
    check: HashCheck
    secret: bytes = field(repr=False)
    start: int = 0
    """The first byte of `kept`."""
    kept: memoryview = field(default_factory=lambda: memoryview(b""), repr=False)
    """Opened chunks that reach beyond the last piece: other writers have other chunk sizes."""


class _Reader:
    """Each tensor is read from its beginning to its end by one thread; several at once."""

    def __init__(self, opened: OpenTensors, digests: dict[str, bytes]) -> None:
        self._opened = opened
        self._digests = digests
        self._records = {record.name: record for record in opened.index.tensors}
        self._begun: dict[str, _Tensor] = {}
        for record in opened.index.tensors:
            if not record.length:  # of which no piece is read
                self._begin(record).check.compare()

    def read(self, name: str, start: int, view: memoryview) -> None:
        """Fills `view` with the tensor's plain text from its byte `start` on."""
        record = self._records[name]
        tensor = self._begun.pop(name) if start else self._begin(record)
        self._fill(record, tensor, start, view)
        tensor.check.update(view)
        if start + len(view) == record.length:
            tensor.check.compare()
        else:
            self._begun[name] = tensor

    def _begin(self, record: TensorRecord) -> _Tensor:
        header = read_header(self._opened.source, record, self._opened.index)
        key = self._opened.key
        secret = key.for_header(header) if key is not None and header.chunks is not None else b""
        return _Tensor(header, HashCheck(header, self._digests[record.name]), secret)

    def _fill(self, record: TensorRecord, tensor: _Tensor, start: int, view: memoryview) -> None:
        chunks = tensor.header.chunks
        if chunks is None:
            self._opened.source.read_into(record.data_offset + start, view)
            return
        size = record.length if chunks.count == 1 else chunks.chunk_size
        while view:
            at = start - tensor.start
            if 0 <= at < len(tensor.kept):
                taken = tensor.kept[at : at + len(view)]
                view[: len(taken)] = taken
                start, view = start + len(taken), view[len(taken) :]
                continue
            first = start // size
            whole = len(view) // size * size if start % size == 0 else 0
            if start + len(view) == record.length and start % size == 0:
                whole = len(view)
            if whole:
                self._open(record, tensor, first, view[:whole])
                start, view = start + whole, view[whole:]
                continue
            begin, stop = chunks.chunk_bounds(first, record.length)
            tensor.start, tensor.kept = begin, memoryview(bytearray(stop - begin))
            self._open(record, tensor, first, tensor.kept)

    def _open(self, record: TensorRecord, tensor: _Tensor, first: int, out: memoryview) -> None:
        """Fills `out` with whole chunks from number `first` on. Damage in transit is read again."""
        try:
            self._open_once(record, tensor, first, out)
        except TagMismatchError:
            if not self._opened.source.remote:
                raise
            self._open_once(record, tensor, first, out)

    def _open_once(
        self, record: TensorRecord, tensor: _Tensor, first: int, out: memoryview
    ) -> None:
        chunks = tensor.header.chunks
        assert chunks is not None
        begin, number, done = chunks.chunk_bounds(first, record.length)[0], first, 0
        self._opened.source.read_into(record.data_offset + begin, out)
        while done < len(out):
            start, stop = chunks.chunk_bounds(number, record.length)
            with out[done : done + stop - start] as box:
                open_tensor_chunk(tensor.header, tensor.secret, number, box, box)
            done += stop - start
            number += 1
