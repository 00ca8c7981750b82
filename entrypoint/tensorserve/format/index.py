"""Which tensors does a .tensors file hold, at which offsets, and is its index consistent?

The layout is that of tensorizer 2.10.1 to 2.12.1 (tensorizer/serialization.py), unchanged since
1.0: 73 fixed bytes, a metadata block (one entry for each tensor, zero padding), then for each
tensor its header and its data without gaps, then eight zero bytes. The file is untrusted: every
length is checked before anything of that length is read or allocated.
"""

from __future__ import annotations

import hashlib
import math
import struct

from tensorserve.crypto.backends import TAG_SIZE
from tensorserve.errors import CorruptError
from tensorserve.format.byte_reader import DAMAGED_HINT, BoundedReader
from tensorserve.format.dtypes import UnknownDtypeError, parse_dtype
from tensorserve.format.records import KIND_STATE_DICT, FileIndex, Source, TensorRecord
from tensorserve.format.tensor_names import BadNameError, parse_name

MAGIC = b"|TZR|"
# After the magic: version, feature flags, data bytes, reserved, number of tensors, metadata bytes.
_FIXED = struct.Struct("<I32sQ8sQQ")
FIXED_SIZE = len(MAGIC) + _FIXED.size
TERMINATOR_SIZE = 8  # a header length of 0 follows the last tensor

# tensorizer always reserves 256 KiB for the metadata, so that one read of this length is enough.
_FIRST_READ = FIXED_SIZE + 256 * 1024
# 64 times what tensorizer can write, room for some 100,000 tensors.
MAX_METADATA = 16 * 1024 * 1024

VERSIONS = range(1, 6)
_ENCRYPTED_VERSION = 3  # means "encrypted"; later versions have a flag for it
_FLAGS_VERSION = 4
_META_VERSION = 4
_LONG_VERSION = 5
_FLAG_ENCRYPTED = 1
_FLAG_VERSIONED_ENTRIES = 2

# Entry: name length, a byte of name, kind, dtype length, 3 bytes of dtype, dimensions, 3 offsets.
_MIN_ENTRY = 2 + 1 + 1 + 1 + 3 + 1 + 24
_LOCATION = struct.Struct("<QQQ")
_INT64_MAX = 2**63 - 1

# Bytes of a tensor header except name, dtype and shape, for checking its length before reading it.
_HEADER_FIXED = 8 + 2 + 1 + 2 + 1 + 1 + 2 + 8
MAX_HASHES = 255 + 2  # generous: tensorizer writes 41 bytes of hashes, or 35
MAX_CRYPTO_FIXED = 1024  # generous: section, key derivation and cipher without tags are 118 bytes
MIN_CHUNK = 1024


def read_index(source: Source) -> FileIndex:
    """Reads and checks the index of ``source``: one read, two if the metadata exceeds 256 KiB.

    Raises CorruptError, naming the source and the tensor or offset, if the file is not a .tensors
    file, is truncated, or its index is inconsistent; and the source's errors.
    """
    block = source.read(0, min(source.size, _FIRST_READ))
    version, flags, count, metadata_length = _parse_fixed(source, block)
    end = FIXED_SIZE + metadata_length
    if end > len(block):
        block += source.read(len(block), end - len(block))
    block = block[:end]
    encrypted = version == _ENCRYPTED_VERSION or bool(flags & _FLAG_ENCRYPTED)
    tensors = _parse_entries(
        source,
        block,
        count,
        version=version,
        versioned=bool(flags & _FLAG_VERSIONED_ENTRIES),
        encrypted=encrypted,
    )
    described = tensors[-1].end + TERMINATOR_SIZE
    if described != source.size:
        verdict = (
            "It is truncated, or its index is wrong."
            if described > source.size
            else "Something was appended to it, or its index is wrong."
        )
        raise CorruptError(
            f"{source.name} is {source.size} bytes long, but its index describes a file of "
            f"{described} bytes. {verdict}",
            hint=DAMAGED_HINT,
        )
    return FileIndex(
        file_version=version,
        encrypted=encrypted,
        tensors=tensors,
        size=source.size,
        data_bytes=sum(tensor.length for tensor in tensors),
        digest=hashlib.sha256(block).hexdigest(),
    )


def _parse_fixed(source: Source, head: bytes) -> tuple[int, int, int, int]:
    """Version, flags, number of tensors and metadata length of the file that begins with head."""
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise CorruptError(
            f"{source.name} is not a .tensors file: it does not begin with {MAGIC.decode()}.",
            hint="Check the URI. A bundle's weights are written by `tensorserve pack` "
            "or by tensorizer's TensorSerializer.",
        )
    if len(head) < FIXED_SIZE:
        raise CorruptError(
            f"{source.name} is truncated: it is {source.size} bytes long, but the header of a "
            f".tensors file alone has {FIXED_SIZE} bytes.",
            hint=DAMAGED_HINT,
        )
    # The third field, the sum of all data, is skipped: tensorizer itself calls it inaccurate.
    version, raw_flags, _, reserved, count, metadata_length = _FIXED.unpack_from(head, len(MAGIC))
    if version not in VERSIONS:
        raise CorruptError(
            f"{source.name} has data version {version}; versions {VERSIONS[0]} to "
            f"{VERSIONS[-1]} are supported.",
            hint="Pack it again with tensorizer 2.10.1 to 2.12, or use a newer tensorserve.",
        )
    flags = int.from_bytes(raw_flags, "little")
    allowed = 0
    if version >= _FLAGS_VERSION:
        allowed |= _FLAG_ENCRYPTED
    if version >= _LONG_VERSION:
        allowed |= _FLAG_VERSIONED_ENTRIES
    if flags & ~allowed:
        raise _damaged(source, f"its feature flags {flags:#x} are unknown in version {version}")
    if any(reserved):
        raise _damaged(source, "its reserved header field is not zero")
    if metadata_length > source.size - FIXED_SIZE:
        raise CorruptError(
            f"{source.name} is {source.size} bytes long, but its index alone would end at "
            f"{FIXED_SIZE + metadata_length} bytes. It is truncated, or its header is wrong.",
            hint=DAMAGED_HINT,
        )
    if metadata_length > MAX_METADATA:
        raise _damaged(source, f"its index has {metadata_length} bytes, over {MAX_METADATA}")
    if count == 0:
        raise _damaged(source, "it holds no tensors")
    if count * _MIN_ENTRY > metadata_length:
        raise _damaged(
            source,
            f"it claims {count} tensors, which an index of {metadata_length} bytes cannot hold",
        )
    return version, flags, count, metadata_length


def _parse_entries(
    source: Source, block: bytes, count: int, *, version: int, versioned: bool, encrypted: bool
) -> tuple[TensorRecord, ...]:
    reader = BoundedReader(block, f"{source.name}: index")
    reader.offset = FIXED_SIZE
    tensors: list[TensorRecord] = []
    names: set[str] = set()
    expected_offset = len(block)
    for number in range(count):
        record = _parse_entry(source, reader, number, versioned=versioned)
        if record.name in names:
            raise _damaged(source, f"two tensors are called {record.name!r}")
        names.add(record.name)
        _check_place(source, record, expected_offset, encrypted=encrypted)
        if record.is_meta and version < _META_VERSION:
            raise _damaged(source, f"tensor {record.name!r} of shape {record.shape} has no data")
        expected_offset = record.end
        tensors.append(record)
    if reader.take(reader.left, "padding").strip(b"\0"):
        raise _damaged(source, f"its index goes on after the {count} tensors that it claims")
    return tuple(tensors)


def _parse_entry(
    source: Source, reader: BoundedReader, number: int, *, versioned: bool
) -> TensorRecord:
    start = reader.offset
    long_shape = False
    if versioned:
        entry_version = reader.u32("entry version")
        if entry_version not in (1, _LONG_VERSION):
            raise _damaged(source, f"index entry {number} is of unknown version {entry_version}")
        long_shape = entry_version == _LONG_VERSION
    raw_name = reader.take(reader.u16("name length"), "name")
    try:
        name = parse_name(raw_name)
    except BadNameError as error:
        raise _damaged(
            source, f"the name of tensor {number} (index entry at offset {start}) {error}"
        ) from None
    kind = reader.u8("kind")
    if kind > KIND_STATE_DICT:
        raise _damaged(source, f"tensor {name!r} is of unknown kind {kind}")
    try:
        dtype = parse_dtype(reader.take(reader.u8("dtype length"), "dtype"))
    except UnknownDtypeError as error:
        raise _damaged(source, f"tensor {name!r}: {error}") from None
    shape = reader.shape(long=long_shape)
    header_offset, data_offset, length = _LOCATION.unpack(reader.take(24, "location"))

    # torch's limit for a shape; zero dimensions count as 1, as for torch's strides. This comes
    # first: Python refuses to print the product of 255 huge dimensions in decimal.
    if math.prod(dimension or 1 for dimension in shape) * dtype.item_size > _INT64_MAX:
        raise _damaged(source, f"tensor {name!r} has an impossible shape {shape}")
    nbytes = math.prod(shape) * dtype.item_size
    is_meta = length == 0 and nbytes > 0
    if not is_meta and nbytes != length:
        raise _damaged(
            source,
            f"tensor {name!r} of shape {shape} and dtype {dtype.name} takes {nbytes} bytes, "
            f"but its index entry says {length}",
        )
    return TensorRecord(
        name=name,
        kind=kind,
        dtype=dtype.name,
        shape=shape,
        header_offset=header_offset,
        data_offset=data_offset,
        length=length,
        raw_dtype=dtype.raw,
        raw_name=raw_name,
        is_meta=is_meta,
        long_shape=long_shape,
    )


def _check_place(
    source: Source, record: TensorRecord, expected_offset: int, *, encrypted: bool
) -> None:
    """Raises CorruptError for a gap, an overlap, or an impossible length of the header."""
    if record.header_offset != expected_offset:
        fault = (
            "overlaps the bytes before it"
            if record.header_offset < expected_offset
            else "leaves a gap"
        )
        raise _damaged(
            source,
            f"tensor {record.name!r} begins at offset {record.header_offset}, "
            f"not at {expected_offset}: it {fault}",
        )
    shape_size = len(record.shape) * (8 if record.long_shape else 4)
    least = _HEADER_FIXED + len(record.raw_name) + len(record.raw_dtype) + shape_size
    most = least + MAX_HASHES
    if encrypted:
        most += MAX_CRYPTO_FIXED + TAG_SIZE * -(-record.length // MIN_CHUNK)
    if not least <= record.header_length <= most:
        raise _damaged(
            source,
            f"tensor {record.name!r} has its header at {record.header_offset} and its data at "
            f"{record.data_offset}: a header of {record.header_length} bytes is not possible",
        )


def _damaged(source: Source, problem: str) -> CorruptError:
    return CorruptError(f"{source.name}: {problem}.", hint=DAMAGED_HINT)
