"""How are little-endian fields read from untrusted bytes without reading past their end?"""

from __future__ import annotations

import struct

from tensorserve.errors import CorruptError

DAMAGED_HINT = (
    "The file is damaged, or not written by tensorizer. Copy or pack it again, "
    "and compare its SHA-256 with the original's."
)

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")


class BoundedReader:
    """Reads fields one after another and never past the end of ``data``.

    ``where`` names the data in messages ("s3://b/m.tensors: index"); ``base`` is the file offset
    of ``data[0]``, so that messages give offsets in the file. A length is compared with the bytes
    that are left before anything is copied or allocated. Every method raises CorruptError if too
    few bytes are left.
    """

    __slots__ = ("_base", "_data", "_end", "_where", "offset")

    def __init__(self, data: bytes, where: str, *, base: int = 0) -> None:
        self._data = data
        self._end = len(data)
        self._where = where
        self._base = base
        self.offset = 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self._end - self.offset

    def _claim(self, length: int, what: str) -> int:
        start = self.offset
        if length > self._end - start:
            raise CorruptError(
                f"{self._where}: {what} at offset {self._base + start} claims {length} bytes, "
                f"but only {self._end - start} are left",
                hint=DAMAGED_HINT,
            )
        self.offset = start + length
        return start

    def take(self, length: int, what: str) -> bytes:
        """The next ``length`` bytes."""
        start = self._claim(length, what)
        return self._data[start : self.offset]

    def u8(self, what: str) -> int:
        """An unsigned 8-bit integer."""
        return self._data[self._claim(1, what)]

    def u16(self, what: str) -> int:
        """An unsigned 16-bit integer."""
        value: int = _U16.unpack_from(self._data, self._claim(2, what))[0]
        return value

    def u32(self, what: str) -> int:
        """An unsigned 32-bit integer."""
        value: int = _U32.unpack_from(self._data, self._claim(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        """An unsigned 64-bit integer."""
        value: int = _U64.unpack_from(self._data, self._claim(8, what))[0]
        return value

    def i64(self, what: str) -> int:
        """A signed 64-bit integer."""
        value: int = _I64.unpack_from(self._data, self._claim(8, what))[0]
        return value

    def shape(self, *, long: bool) -> tuple[int, ...]:
        """The number of dimensions (one byte), then the dimensions: 4 bytes each, 8 if `long`."""
        dimensions = self.u8("number of dimensions")
        width, code = (8, "Q") if long else (4, "I")
        start = self._claim(dimensions * width, "shape")
        return struct.unpack_from(f"<{dimensions}{code}", self._data, start)

    def done(self, what: str) -> None:
        """Checks that ``what`` ends here. Raises CorruptError if bytes are left."""
        if self.offset != self._end:
            raise CorruptError(
                f"{self._where}: {self._end - self.offset} bytes too many "
                f"after the {what}, at offset {self._base + self.offset}",
                hint=DAMAGED_HINT,
            )
