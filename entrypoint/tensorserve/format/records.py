"""What does a .tensors file say about itself: the plain data that the rest works with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tensorserve.format.dtypes import ITEM_SIZES

KIND_PARAMETER, KIND_BUFFER, KIND_STATE_DICT = range(3)


class Source(Protocol):
    """What this package needs of a tensorserve.sources.Source; see there."""

    @property
    def name(self) -> str: ...  # redacted, fit for messages
    @property
    def size(self) -> int: ...  # bytes
    def read(self, offset: int, length: int) -> bytes: ...
    def read_into(self, offset: int, buffer: memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor, as the index describes it. Offsets and lengths are bytes in the file."""

    name: str
    kind: int  # KIND_PARAMETER, KIND_BUFFER or KIND_STATE_DICT
    dtype: str  # torch's name, "bfloat16"
    shape: tuple[int, ...]
    header_offset: int
    data_offset: int  # the header ends here: header and data are one contiguous range
    length: int
    raw_dtype: str  # as it stands in the file
    raw_name: bytes  # as it stands in the file
    is_meta: bool  # a shape without data: tensorizer gives zeros for it
    long_shape: bool  # dimensions take 8 bytes in the header

    @property
    def header_length(self) -> int:
        """Bytes of the header."""
        return self.data_offset - self.header_offset

    @property
    def end(self) -> int:
        """The offset just past the data, where the next header begins."""
        return self.data_offset + self.length

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory: ``length``, except for meta tensors.

        For those it is bounded by nothing in the file; compare it with the parameter that is to
        be filled before allocating.
        """
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileIndex:
    """What a file says it holds, after every check that needs no tensor data."""

    file_version: int
    encrypted: bool
    tensors: tuple[TensorRecord, ...]  # in the order of the file, contiguous
    size: int  # bytes of the file
    data_bytes: int  # sum of the tensors' lengths
    digest: str  # SHA-256 (hex) of the file's bytes before the first tensor's header
