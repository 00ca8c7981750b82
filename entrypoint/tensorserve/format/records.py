"""Which data classes describe a .tensors file's index?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

KIND_PARAMETER, KIND_BUFFER, KIND_STATE_DICT = range(3)


class Source(Protocol):
    """The part of tensorserve.sources.Source that this room needs; documented there."""

    @property
    def name(self) -> str: ...  # redacted, for messages
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
    raw_dtype: str  # the string in the file
    raw_name: bytes  # the bytes in the file
    is_meta: bool  # a shape without data, for which tensorizer gives zeros
    long_shape: bool  # dimensions take 8 bytes in the header

    @property
    def header_length(self) -> int:
        """The header's length in bytes."""
        return self.data_offset - self.header_offset

    @property
    def end(self) -> int:
        """The offset after the data, where the next header begins."""
        return self.data_offset + self.length


@dataclass(frozen=True, slots=True)
class FileIndex:
    """A file's index, after every check that needs no tensor data."""

    file_version: int
    encrypted: bool
    tensors: tuple[TensorRecord, ...]  # in file order, contiguous
    size: int  # bytes of the file
    data_bytes: int  # sum of the tensors' lengths
    digest: str  # SHA-256 (hex) of the file's bytes before the first tensor's header
