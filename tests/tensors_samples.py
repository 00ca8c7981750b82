"""Sample .tensors files for the tests: written by the real tensorizer, or lying on purpose."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorizer import DecryptionParams, EncryptionParams, TensorDeserializer, TensorSerializer

from tensorserve.format import FileKey, TensorHeader, read_index, read_tensor

KEY = bytes(range(32))
PASSPHRASE = "correct horse battery staple"
FIXED_SIZE = 73


class MemorySource:
    """A source over bytes. Reading outside of them fails the test, whatever the test expects."""

    version = None

    def __init__(self, data: bytes, name: str = "memory:sample.tensors") -> None:
        self.name = name
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, "a read outside of the file"
        self.reads.append((offset, length))
        return self.data[offset : offset + length]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))


@dataclass
class FixedKey:
    """The simplest FileKey."""

    key: bytes = KEY
    origin: str = "the test"

    @property
    def of_all_headers(self) -> None: ...

    def for_header(self, header: TensorHeader) -> bytes:  # noqa: ARG002
        return self.key


def encryption(kind: str) -> EncryptionParams | None:
    """tensorizer's parameters for "plain", "key" or (cheap to derive) "passphrase"."""
    if kind == "plain":
        return None
    if kind == "key":
        return EncryptionParams(KEY)
    return EncryptionParams.from_string(
        PASSPHRASE,
        opslimit=EncryptionParams.OpsLimit.MIN,
        memlimit=EncryptionParams.MemLimit.MIN,
    )


def decryption(kind: str) -> DecryptionParams | None:
    """What tensorizer needs to read what encryption(kind) sealed."""
    if kind == "plain":
        return None
    if kind == "key":
        return DecryptionParams.from_key(KEY)
    return DecryptionParams.from_string(PASSPHRASE)


def write(content: Any, params: EncryptionParams | None = None) -> bytes:
    """The bytes of a file that tensorizer writes of a state dict or a module."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tensors"
        serializer = TensorSerializer(path, encryption=params)
        if isinstance(content, torch.nn.Module):
            serializer.write_module(content)
        else:
            serializer.write_state_dict(content)
        serializer.close()
        return path.read_bytes()


def tensorizer_reads(data: bytes, kind: str = "plain") -> Mapping[Any, Any]:
    """What tensorizer itself finds in the file, hashes verified."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tensors"
        path.write_bytes(data)
        with TensorDeserializer(
            path, device="cpu", encryption=decryption(kind), verify_hash=True, num_readers=1
        ) as deserializer:
            return deserializer.tree()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The memory of a tensor, whatever its dtype."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def we_read(
    data: bytes, key: FileKey | None = None, *, verify: bool = True
) -> dict[str, tuple[int, str, tuple[int, ...], bytes]]:
    """What we find in the file: kind, dtype, shape and bytes by name."""
    source = MemorySource(data)
    index = read_index(source)
    return {
        record.name: (
            record.kind,
            record.dtype,
            record.shape,
            bytes(read_tensor(source, record, index, key, verify=verify)),
        )
        for record in index.tensors
    }


def compact(data: bytes, padding: int = 4) -> bytes:
    """The same file with ``padding`` bytes instead of almost 256 KiB after its index.

    So small that each of its bits can be tried. Every offset in the index moves with the data;
    the tensors' headers hold no offsets. Knows the layout by itself, not through our parser.
    """
    count, metadata_length = struct.unpack_from("<QQ", data, FIXED_SIZE - 16)
    versioned = bool(data[9] & 2)
    entries = bytearray(data[FIXED_SIZE : FIXED_SIZE + metadata_length])
    at = 0
    places = []
    for _ in range(count):
        wide = versioned and struct.unpack_from("<I", entries, at)[0] == 5
        at += 4 if versioned else 0
        at += 2 + struct.unpack_from("<H", entries, at)[0]  # name
        at += 1  # kind
        at += 1 + entries[at]  # dtype
        at += 1 + entries[at] * (8 if wide else 4)  # shape
        places.append(at)
        at += 24
    removed = metadata_length - at - padding
    for place in places:
        header, start = struct.unpack_from("<QQ", entries, place)
        struct.pack_into("<QQ", entries, place, header - removed, start - removed)
    return (
        data[: FIXED_SIZE - 8]
        + struct.pack("<Q", at + padding)
        + entries[: at + padding]
        + data[FIXED_SIZE + metadata_length :]
    )


@dataclass
class Entry:
    """One index entry that may say anything; offsets left at None follow the one before."""

    name: bytes = b"weight"
    kind: int = 0
    dtype: bytes = b"<f4"
    shape: tuple[int, ...] = (4,)
    length: int = 16
    header_length: int = 80
    header_offset: int | None = None
    version: int | None = None


def lying_file(
    *entries: Entry,
    file_version: int = 1,
    flags: int = 0,
    reserved: int = 0,
    count: int | None = None,
    metadata_length: int | None = None,
    padding: bytes = b"",
    size: int | None = None,
) -> bytes:
    """A file with that index and zeros behind it, consistent where not told otherwise."""

    def index(first: int) -> tuple[bytes, int]:
        parts, at = [], first
        for entry in entries:
            begin = at if entry.header_offset is None else entry.header_offset
            if entry.version is not None:
                parts.append(struct.pack("<I", entry.version))
            parts.append(struct.pack("<H", len(entry.name)) + entry.name)
            parts.append(struct.pack("<BB", entry.kind, len(entry.dtype)) + entry.dtype)
            code = "Q" if entry.version == 5 else "I"
            dimensions = len(entry.shape)
            parts.append(struct.pack(f"<B{dimensions}{code}", dimensions, *entry.shape))
            parts.append(struct.pack("<QQQ", begin, begin + entry.header_length, entry.length))
            at = begin + entry.header_length + entry.length
        return b"".join([*parts, padding]), at

    first = FIXED_SIZE + len(index(2**20)[0])  # offsets have a fixed width
    block, end = index(first)
    head = b"|TZR|" + struct.pack(
        "<I32sQQQQ",
        file_version,
        flags.to_bytes(32, "little"),
        0,
        reserved,
        len(entries) if count is None else count,
        len(block) if metadata_length is None else metadata_length,
    )
    total = min(end + 8, 2**20) if size is None else size
    return (head + block).ljust(total, b"\0")
