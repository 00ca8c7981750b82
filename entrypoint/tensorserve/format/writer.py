"""How is a .tensors file written sequentially, to an output that can only append?

The whole index is computed first, from names, dtypes and shapes. Then tensors are read, hashed and
encrypted, a few at a time, and written in file order. The layout is tensorizer 2.12.1's
(serialization.py, _crypt_info.py), except that the index has the size that it needs; tensorizer
reserves 256 KiB and cannot exceed them.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple, Protocol

from tensorserve.crypto.backends import NONCE_SIZE, TAG_SIZE
from tensorserve.crypto.secretbox import (
    ALGORITHM_ARGON2ID13,
    SALT_SIZE,
    nonce_at,
    seal_chunk,
)
from tensorserve.errors import ConfigurationError
from tensorserve.format.dtypes import ITEM_SIZES, OPAQUE_SEPARATOR, raw_dtype
from tensorserve.format.header import FileKey, PasswordHash, parse_header
from tensorserve.format.index import MAGIC, MAX_METADATA, TERMINATOR_SIZE, read_index
from tensorserve.format.records import KIND_STATE_DICT, FileIndex, TensorRecord
from tensorserve.format.tensor_names import BadNameError, parse_name

CHUNK_BYTES = 2 * 1024**2  # bytes, tensorizer's
# Bytes that are read, hashed and written at once; a multiple of the chunk size.
_STEP = 8 * 1024**2
# Memory, in units of the largest tensor: one is written while two are prepared. Of smaller tensors,
# more are prepared.
_TENSORS_AT_ONCE = 3
_MAX_WAITING = 64
# Four threads hash 5 GB/s, more than one stream to a disk or a bucket takes.
_MAX_THREADS = 4
_MAX_NAME = 2**16 - 1  # bytes: its length has 16 bits
_MAX_DIMENSIONS = 255
_LONG_DIMENSION = 2**32  # from this dimension on, the shape's dimensions take 8 bytes each

# tensorizer's data versions. A file has the lowest version with the features that it needs.
_PLAIN_VERSION, _OPAQUE_VERSION, _ENCRYPTED_VERSION, _FLAGS_VERSION, _LONG_VERSION = 1, 2, 3, 4, 5
_FLAG_ENCRYPTED, _FLAG_VERSIONED_ENTRIES = 1, 2

# libsodium's "moderate" preset, which tensorizer's EncryptionParams.from_string uses: about half a
# second and 256 MiB (https://doc.libsodium.org/password_hashing/default_phf).
_MODERATE_PASSES, _MODERATE_MEMORY = 3, 256 * 1024**2


class Output(Protocol):
    """The output of a file: `write` takes all of `data`, or raises."""

    def write(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: ``dtype`` is torch's name ("bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: int = KIND_STATE_DICT

    @property
    def length(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """Everything about a file except its tensors' contents."""

    prologue: bytes  # the bytes before the first tensor's header
    index: FileIndex  # as read_index will return it
    derivation: PasswordHash | None


@dataclass(frozen=True)
class WrittenDigests:
    """The digests of a written file, for its manifest."""

    headers_sha256: str  # hex, of all tensor headers in file order
    tensors: tuple[bytes, ...]  # SHA-256 of each tensor in file order, as HashCheck computes it


# (tensor, first byte of it, buffer to fill)
ReadTensor = Callable[[TensorRecord, int, memoryview], None]


def fresh_password_hash() -> PasswordHash:
    """The key derivation of a new file: tensorizer's defaults and a random salt."""
    return PasswordHash(_MODERATE_PASSES, _MODERATE_MEMORY, os.urandom(SALT_SIZE))


def plan_file(
    specs: Iterable[TensorSpec], *, encrypted: bool, derivation: PasswordHash | None = None
) -> FilePlan:
    """Computes the layout of a file with the tensors ``specs``, in this order.

    ``derivation`` is written into each sealed header of a file encrypted with a passphrase. Raises
    ConfigurationError, naming the tensor, for a name or shape that the format cannot hold;
    UnknownDtypeError for such a dtype.
    """
    specs = tuple(specs)
    long = any(_is_long(spec) for spec in specs)
    raw_names = [_raw_name(spec) for spec in specs]
    _refuse_duplicates(specs)
    metadata_length = sum(
        (4 if long else 0)
        + (2 + len(raw_name) + 1 + 1 + len(raw_dtype(spec.dtype)) + 1)
        + len(spec.shape) * (8 if _is_long(spec) else 4)
        + 24
        for spec, raw_name in zip(specs, raw_names, strict=True)
    )
    if not 0 < metadata_length <= MAX_METADATA:
        raise ConfigurationError(
            f"The names and shapes of {len(specs)} tensors take {metadata_length} bytes; "
            f"a .tensors file can hold 1 to {MAX_METADATA}.",
        )
    version = max(
        _PLAIN_VERSION,
        _OPAQUE_VERSION if any(_is_opaque(spec) for spec in specs) else 0,
        _ENCRYPTED_VERSION if encrypted else 0,
        _LONG_VERSION if long else 0,
    )
    flags = 0
    if version >= _FLAGS_VERSION:
        flags = (_FLAG_ENCRYPTED if encrypted else 0) | (_FLAG_VERSIONED_ENTRIES if long else 0)
    parts = [
        MAGIC,
        struct.pack(
            "<I32sQ8xQQ",
            version,
            flags.to_bytes(32, "little"),
            sum(spec.length for spec in specs),
            len(specs),
            metadata_length,
        ),
    ]
    offset = sum(map(len, parts)) + metadata_length
    for spec, raw_name in zip(specs, raw_names, strict=True):
        record = _place(spec, raw_name, offset, encrypted=encrypted, derivation=derivation)
        parts.append(_entry(record, versioned=long))
        offset = record.end
    prologue = b"".join(parts)
    # The index is read back: read_index has to accept what will be written.
    index = read_index(_Planned(prologue, offset + TERMINATOR_SIZE))
    return FilePlan(prologue, index, derivation)


def write_file(
    out: Output,
    plan: FilePlan,
    read: ReadTensor,
    *,
    key: FileKey | None,
    on_bytes: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> WrittenDigests:
    """Writes the planned file to ``out``; returns the digests of its headers and tensors.

    ``read`` fills a buffer with bytes of a tensor and is called by several threads. ``on_bytes`` is
    called with the number of data bytes written. ``threads`` is the number of threads that hash and
    encrypt (default: up to 4). Memory: three times the largest tensor. Raises the exceptions of
    ``read`` and ``out``, ValueError for a key with a plain file or none with an encrypted one, and
    the key's errors.
    """
    if (key is not None) != plan.index.encrypted:
        raise ValueError("a key is needed for an encrypted file, and only for that")
    tensors = plan.index.tensors
    secret = _resolve(plan, key)
    headers = hashlib.sha256()
    out.write(plan.prologue)
    # One random nonce for the file, incremented for each chunk, so that no nonce is used twice.
    start, used = os.urandom(NONCE_SIZE), 0
    # Tensors are prepared in threads, and written in this thread, in file order.
    threads = threads or min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[tuple[TensorRecord, Future[_Prepared]]] = deque()
    digests: list[bytes] = []
    room = _TENSORS_AT_ONCE * max(tensor.length for tensor in tensors)
    held = 0
    preparation = _Preparation(plan, read, secret)

    def write_next() -> None:
        nonlocal held
        record, job = waiting.popleft()
        header, data, digest = job.result()
        headers.update(header)
        digests.append(digest)
        out.write(header)
        for begin in range(0, record.length, _STEP):
            piece = data[begin : begin + _STEP]
            out.write(piece)
            on_bytes(len(piece))
        held -= record.length

    with ThreadPoolExecutor(threads, thread_name_prefix="tensorserve-pack") as pool:
        try:
            for record in tensors:
                while waiting and (held + record.length > room or len(waiting) == _MAX_WAITING):
                    write_next()
                held += record.length
                job = pool.submit(preparation.prepare, record, nonce_at(start, used))
                waiting.append((record, job))
                used += _chunks(record.length)
            while waiting:
                write_next()
        except BaseException:
            preparation.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    out.write(bytes(TERMINATOR_SIZE))
    return WrittenDigests(headers.hexdigest(), tuple(digests))


class _Prepared(NamedTuple):
    """A tensor's header and data as they are written, and its digest."""

    header: bytes
    data: memoryview
    sha256: bytes


class _Preparation:
    """Reads, hashes and encrypts tensors. Thread-safe."""

    def __init__(self, plan: FilePlan, read: ReadTensor, secret: bytes | None) -> None:
        self._plan = plan
        self._read = read
        self._secret = secret
        self.stopped = False

    def prepare(self, record: TensorRecord, nonce: bytes) -> _Prepared:
        """The prepared tensor, in newly allocated memory. `nonce` is that of its first chunk."""
        plan = self._plan
        template = _header(record, _unhashed(plan), _crypto(plan, record, nonce, b""))
        crypto_start, crypto_stop = _crypto_bounds(plan, record, template)
        hashed = template[:crypto_start] + template[crypto_stop:]
        sha256, crc32 = hashlib.sha256(hashed), zlib.crc32(hashed)
        secret = self._secret if record.length else None
        # Mapped, not allocated: malloc would keep each thread's freed memory.
        data = memoryview(mmap(-1, record.length) if record.length else b"")
        tags = bytearray()
        for begin in range(0, record.length, _STEP):
            if self.stopped:
                break  # the result is not used
            piece = data[begin : begin + _STEP]
            self._read(record, begin, piece)
            sha256.update(piece)
            if secret is None:
                crc32 = zlib.crc32(piece, crc32)
                continue
            for at in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[at : at + CHUNK_BYTES]
                number = nonce_at(nonce, (begin + at) // CHUNK_BYTES)
                tags += seal_chunk(secret, number, chunk, chunk)
        hashes = _hashes(plan.index.encrypted, crc32, sha256.digest())
        header = _header(record, hashes, _crypto(plan, record, nonce, bytes(tags)))
        return _Prepared(header, data, sha256.digest())


def _resolve(plan: FilePlan, key: FileKey | None) -> bytes | None:
    """The 32-byte key, obtained from a header exactly as a reader obtains it."""
    sealed = next((tensor for tensor in plan.index.tensors if tensor.length), None)
    if key is None or sealed is None:
        return None
    nonce = bytes(24)
    header = _header(sealed, _unhashed(plan), _crypto(plan, sealed, nonce, b""))
    return key.for_header(parse_header(sealed, header, encrypted=True, source_name="The new file"))


def _is_long(spec: TensorSpec) -> bool:
    return any(dimension >= _LONG_DIMENSION for dimension in spec.shape)


def _is_opaque(spec: TensorSpec) -> bool:
    return OPAQUE_SEPARATOR.encode() in raw_dtype(spec.dtype)


def _chunks(length: int) -> int:
    return -(-length // CHUNK_BYTES)


def _raw_name(spec: TensorSpec) -> bytes:
    try:
        raw = spec.name.encode("utf-8")
        if parse_name(raw) != spec.name:
            raise BadNameError("would be read as a path")
    except (BadNameError, UnicodeEncodeError) as error:
        raise ConfigurationError(
            f"A tensor called {spec.name!r} cannot be stored: its name {error}."
        ) from error
    if len(raw) > _MAX_NAME or len(spec.shape) > _MAX_DIMENSIONS:
        raise ConfigurationError(
            f"Tensor {spec.name[:80]!r}: its name has {len(raw)} bytes and it has "
            f"{len(spec.shape)} dimensions; the limits are {_MAX_NAME} and {_MAX_DIMENSIONS}."
        )
    return raw


def _refuse_duplicates(specs: tuple[TensorSpec, ...]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ConfigurationError(f"Two tensors are called {spec.name!r}.")
        seen.add(spec.name)


def _place(
    spec: TensorSpec,
    raw_name: bytes,
    offset: int,
    *,
    encrypted: bool,
    derivation: PasswordHash | None,
) -> TensorRecord:
    shape_length = len(spec.shape) * (8 if _is_long(spec) else 4)
    raw = raw_dtype(spec.dtype)
    sealed = encrypted and spec.length > 0
    length = 8 + 2 + 1 + 2 + len(raw_name) + 1 + len(raw) + 1 + shape_length + 2 + 8
    length += len(_hashes(encrypted, 0, bytes(32)))
    if encrypted:
        length += 8 + 2
    if sealed:
        length += 8 + 2 + 8 + 24 + 8 + TAG_SIZE * _chunks(spec.length)
        length += 8 + len(_derivation(derivation)) if derivation else 0
    return TensorRecord(
        name=spec.name,
        kind=spec.kind,
        dtype=spec.dtype,
        shape=spec.shape,
        header_offset=offset,
        data_offset=offset + length,
        length=spec.length,
        raw_dtype=raw.decode(),
        raw_name=raw_name,
        is_meta=False,
        long_shape=_is_long(spec),
    )


def _description(record: TensorRecord) -> bytes:
    """The encoded dtype and shape, which are equal in index entry and header."""
    raw = record.raw_dtype.encode("ascii")
    count = len(record.shape)
    code = "Q" if record.long_shape else "I"
    return struct.pack(f"<B{len(raw)}sB{count}{code}", len(raw), raw, count, *record.shape)


def _entry(record: TensorRecord, *, versioned: bool) -> bytes:
    version = struct.pack("<I", _LONG_VERSION if record.long_shape else _PLAIN_VERSION)
    return b"".join(
        (
            version if versioned else b"",
            struct.pack("<H", len(record.raw_name)) + record.raw_name,
            struct.pack("<B", record.kind),
            _description(record),
            struct.pack("<QQQ", record.header_offset, record.data_offset, record.length),
        )
    )


def _header(record: TensorRecord, hashes: bytes, crypto: bytes) -> bytes:
    # The second field is a module number, always 0 in a state dict.
    fixed = struct.pack("<QHBH", record.header_length, 0, record.kind, len(record.raw_name))
    length = struct.pack("<q", record.length)
    header = b"".join(
        (
            *(fixed, record.raw_name, _description(record)),
            *(struct.pack("<H", len(hashes)), hashes, crypto, length),
        )
    )
    assert len(header) == record.header_length
    return header


def _crypto_bounds(plan: FilePlan, record: TensorRecord, header: bytes) -> tuple[int, int]:
    """(start, stop) of the crypto section in ``header``; the hashes do not cover it."""
    stop = len(header) - 8
    return stop - len(_crypto(plan, record, bytes(24), b"")), stop


def _unhashed(plan: FilePlan) -> bytes:
    return _hashes(plan.index.encrypted, 0, bytes(32))


def _hashes(encrypted: bool, crc32: int, sha256: bytes) -> bytes:
    """The hashes section: CRC-32 and SHA-256 in plain files, as tensorizer writes them, else empty.

    A plain digest of an encrypted tensor would let anybody recognise a known tensor, and guess the
    values of a small one. tensorizer writes it nevertheless; its reader accepts headers without
    hashes (2.10.1 to 2.12.1). The manifest has the digests, encrypted.
    """
    if encrypted:
        return b"\0"
    return struct.pack("<BBBIBB", 2, 0, 4, crc32, 1, 32) + sha256


def _crypto(plan: FilePlan, record: TensorRecord, nonce: bytes, tags: bytes) -> bytes:
    """The crypto section: empty in plain files, without entries for a tensor without data."""
    if not plan.index.encrypted:
        return b""
    entries = []
    if record.length:
        if plan.derivation is not None:
            entries.append(_derivation(plan.derivation))
        count = _chunks(record.length)
        cipher = struct.pack("<HQ24sQ", 2, CHUNK_BYTES, nonce, count)
        entries.append(cipher + tags.ljust(count * TAG_SIZE, b"\0"))
    sized = b"".join(struct.pack("<Q", len(entry)) + entry for entry in entries)
    return struct.pack("<QH", 2 + len(sized), len(entries)) + sized


def _derivation(derivation: PasswordHash) -> bytes:
    salt = derivation.salt
    numbers = (derivation.passes, derivation.memory, ALGORITHM_ARGON2ID13)
    return struct.pack(f"<HHQQiH{len(salt)}s", 1, 1, *numbers, len(salt), salt)


class _Planned:
    """A source for read_index with the planned prologue, followed by zeros."""

    name = "The new file"

    def __init__(self, prologue: bytes, size: int) -> None:
        self._prologue = prologue
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return self._prologue[offset : offset + length].ljust(length, b"\0")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))
