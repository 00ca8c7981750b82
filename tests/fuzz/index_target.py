"""What must hold for any bytes that are taken for a .tensors file? The target of the fuzzer.

Used by fuzz_index.py, which makes the bytes, and by tests/unit/format/test_format_corpus.py, which
replays those that were worth keeping.
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

from tensorizer.serialization import TensorType, _MetadataDeserializer

from tensorserve import loading
from tensorserve.crypto.backends import NONCE_SIZE, TAG_SIZE
from tensorserve.errors import CorruptError
from tensorserve.format import (
    ITEM_SIZES,
    FileIndex,
    TensorHeader,
    TensorRecord,
    fixed_fields,
    parse_header,
    read_index,
    read_tensor,
)

KEY = bytes(range(32))
FIXED_SIZE = 73
RECORD_LENGTH = 5000

# An input's first byte says what the rest is.
AS_FILE, AS_REPAIRED_FILE, AS_PLAIN_HEADER, AS_SEALED_HEADER = range(4)


class MemorySource:
    """Bytes as a source; a read outside of them is a finding."""

    name = "fuzzed"

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, "a read outside of the file"
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


class FixedKey:
    """The key that the corpus is sealed with."""

    origin = "the fuzzer"

    of_all_headers = KEY

    def for_header(self, header: TensorHeader) -> bytes:  # noqa: ARG002
        return KEY


def check(data: bytes) -> str:
    """What was made of ``data``; raises where anything but CorruptError came out, or nonsense."""
    if not data:
        return "empty"
    mode, body = data[0] % 4, data[1:]
    try:
        if mode in {AS_FILE, AS_REPAIRED_FILE}:
            _check_file(repaired(body) if mode == AS_REPAIRED_FILE else body)
        else:
            _check_header(body, sealed=mode == AS_SEALED_HEADER)
    except CorruptError as error:
        return "refused" if error.message else "refused without a word"
    return "accepted"


def _check_file(data: bytes) -> None:
    source = MemorySource(data)
    index = read_index(source)
    _check_index(index)
    _agrees_with_tensorizer(data, index)
    for record in index.tensors:
        try:
            plaintext = read_tensor(source, record, index, FixedKey(), verify=len(data) % 2 == 0)
        except CorruptError:
            continue
        assert len(plaintext) == record.length


def _check_index(index: FileIndex) -> None:
    """What the rest of the program relies on."""
    tensors = index.tensors
    assert tensors
    assert len({record.name for record in tensors}) == len(tensors)
    for before, record in pairwise(tensors):
        assert before.end == record.header_offset
    for record in tensors:
        assert FIXED_SIZE <= record.header_offset < record.data_offset <= record.end <= index.size
        assert record.length == (
            0 if record.is_meta else math.prod(record.shape) * ITEM_SIZES[record.dtype]
        )
        assert all(0 <= dimension < 2**63 for dimension in record.shape)
        record.name.encode()  # can be printed
    assert tensors[-1].end + 8 == index.size
    assert index.data_bytes <= index.size


def _agrees_with_tensorizer(data: bytes, index: FileIndex) -> None:
    """An index that we accept says the same to tensorizer, or is none to it by its tree of names.

    tensorizer refuses a name that is another's prefix, and mappings with both numbers and text.
    """
    flags, count, length = data[9], *struct.unpack_from("<QQ", data, FIXED_SIZE - 16)
    block = data[FIXED_SIZE : FIXED_SIZE + length]
    try:
        entries, _ = _MetadataDeserializer.from_buffer(block, count, bool(flags & 2), range(1, 6))
    except ValueError as error:
        if "Conflicting tensor paths" in str(error):
            return
        raise
    assert len(entries) == len(index.tensors)
    for entry, record in zip(entries.values(), index.tensors, strict=True):
        assert ".".join(map(str, entry.name)) == record.name
        assert entry.type == TensorType(record.kind)
        assert (entry.dtype, tuple(entry.shape)) == (record.raw_dtype, record.shape)
        assert (entry.offset, entry.data_offset, entry.data_length) == (
            *(record.header_offset, record.data_offset),
            record.length,
        )


def _check_header(data: bytes, *, sealed: bool) -> None:
    record = TensorRecord(
        name="w",
        kind=0,
        dtype="uint8",
        shape=(RECORD_LENGTH,),
        header_offset=1000,
        data_offset=1000 + len(data),
        length=RECORD_LENGTH,
        raw_dtype="|u1",
        raw_name=b"w",
        is_meta=False,
        long_shape=False,
    )
    taken = _taken_by_c(record, data, sealed=sealed)
    try:
        header = parse_header(record, data, encrypted=sealed, source_name="fuzzed")
    except CorruptError:
        assert taken is None, "C takes a header that Python refuses"
        raise
    if taken is not None:
        assert header.key_derivation is None
        assert taken == _sealing(header)
    assert len(header.hashed) <= len(data)
    kinds = {name for name, _ in header.hashes}
    assert (set() if sealed else {"sha256"}) <= kinds <= {"sha256", "crc32"}
    assert (header.chunks is not None) == sealed
    if header.chunks is None:
        return
    at = 0
    for number in range(header.chunks.count):
        start, stop = header.chunks.chunk_bounds(number, RECORD_LENGTH)
        assert start == at < stop <= RECORD_LENGTH
        assert len(header.chunks.chunk_tag(number)) == 16
        assert len(header.chunks.chunk_nonce(number)) == 24
        at = stop
    assert at == RECORD_LENGTH


def _sealing(header: TensorHeader) -> tuple[int, int, bytes, bytes]:
    """Number and size of its chunks, nonce, tags."""
    chunks = header.chunks
    if chunks is None:
        return 0, 0, b"", b""
    size = RECORD_LENGTH if chunks.count == 1 else chunks.chunk_size
    return chunks.count, size, chunks.nonce, chunks.tags


def _taken_by_c(
    record: TensorRecord, data: bytes, *, sealed: bool
) -> tuple[int, int, bytes, bytes] | None:
    """The same as loading/tensor_header.h has it; None where it leaves the header to Python."""
    library = _span_table()
    if library is None:
        return None
    fixed, found = fixed_fields(record), (ctypes.c_int64 * 4)()
    exact = ctypes.create_string_buffer(data, max(1, len(data)))  # a read beyond it is a finding
    if not library.tensor_header_fits(
        exact,
        ctypes.c_int64(len(data)),
        fixed,
        ctypes.c_int64(len(fixed)),
        int(sealed),
        ctypes.c_int64(record.length),
        found,
    ):
        return None
    chunks, size, nonce, tags = found
    if not chunks:
        return 0, 0, b"", b""
    return chunks, size, data[nonce : nonce + NONCE_SIZE], data[tags : tags + TAG_SIZE * chunks]


@cache
def _span_table() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(Path(loading.__file__).with_name("_span_table.so")))
    except OSError:
        return None


def repaired(data: bytes) -> bytes:
    """``data`` with the lengths and offsets of its index made to fit, as far as it has one.

    A fuzzer that changes a name's length shifts everything behind it; with this, what it changed
    is looked at, not refused for the shift.
    """
    if len(data) < FIXED_SIZE:
        return data
    head, rest = bytearray(data[:FIXED_SIZE]), bytearray(data[FIXED_SIZE:])
    versioned = bool(head[9] & 2) and head[5] == 5
    places, at = [], 0
    try:
        while len(places) < 64:
            start, wide = at, False
            if versioned:
                wide = struct.unpack_from("<I", rest, at)[0] == 5
                at += 4
            name_length = struct.unpack_from("<H", rest, at)[0]
            if name_length == 0 and places:
                at = start
                break
            at += 2 + name_length + 1
            at += 1 + rest[at]
            at += 1 + rest[at] * (8 if wide else 4)
            _, _, length = struct.unpack_from("<QQQ", rest, at)
            places.append((at, length))
            at += 24
    except (struct.error, IndexError):
        at = places[-1][0] + 24 if places else 0
    if not places:
        return data
    body, offset = bytes(rest[at:]), FIXED_SIZE + at
    struct.pack_into("<QQ", head, FIXED_SIZE - 16, len(places), at)
    cursor = 0
    for place, length in places:
        stated = struct.unpack_from("<Q", body.ljust(cursor + 8, b"\0"), cursor)[0]
        header_length = stated if 30 <= stated <= 4096 else 80
        struct.pack_into("<QQ", rest, place, offset, offset + header_length)
        step = header_length + min(length, 2**20)
        offset, cursor = offset + step, cursor + step
    if cursor > 2**21:
        return data
    return bytes(head) + bytes(rest[:at]) + body[:cursor].ljust(cursor + 8, b"\0")
