"""How is a .tensors file written from front to back, to something that can only append?

All sizes are known before the first byte: the whole index is planned from names, dtypes and shapes,
then some tensors at a time are read, hashed and sealed, and written in their order. The layout is
tensorizer 2.12.1's (serialization.py, _crypt_info.py), except that the index takes what it needs
where tensorizer reserves (and is limited to) 256 KiB.
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

from tensorserve.errors import ConfigurationError
from tensorserve.format.box import NONCE_SIZE, TAG_SIZE
from tensorserve.format.crypto import (
    ALGORITHM_ARGON2ID13,
    SALT_SIZE,
    nonce_at,
    seal_chunk,
)
from tensorserve.format.dtypes import ITEM_SIZES, OPAQUE_SEPARATOR, raw_dtype
from tensorserve.format.header import FileKey, PasswordHash, parse_header
from tensorserve.format.index import MAGIC, MAX_METADATA, TERMINATOR_SIZE, read_index
from tensorserve.format.names import BadNameError, parse_name
from tensorserve.format.records import KIND_STATE_DICT, FileIndex, TensorRecord

CHUNK_BYTES = 2 * 1024**2  # bytes, tensorizer's
# Read, hashed and written at once; a multiple of the chunk size.
_STEP = 8 * 1024**2
# One that is written, two that are made ready; more of smaller ones.
_TENSORS_AT_ONCE = 3
_MOST_WAITING = 64
# Four hash 5 GB/s: more than one stream to a disk or a bucket takes.
_MOST_THREADS = 4
_MAX_NAME = 2**16 - 1  # bytes: its length has 16 bits
_MAX_DIMENSIONS = 255
_LONG_DIMENSION = 2**32  # from here on, dimensions take 8 bytes each

# tensorizer's data versions: the least that has what the file needs.
_PLAIN_VERSION, _OPAQUE_VERSION, _ENCRYPTED_VERSION, _FLAGS_VERSION, _LONG_VERSION = 1, 2, 3, 4, 5
_FLAG_ENCRYPTED, _FLAG_VERSIONED_ENTRIES = 1, 2

# libsodium's "moderate" preset, which tensorizer's EncryptionParams.from_string uses:
# about half a second and 256 MiB (https://doc.libsodium.org/password_hashing/default_phf).
_MODERATE_PASSES, _MODERATE_MEMORY = 3, 256 * 1024**2


class Output(Protocol):
    """Where the file goes: takes all of what it is given, or raises."""

    def write(self, data: bytes | memoryview, /) -> object: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: ``dtype`` is torch's name ("bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """Everything about a file but its tensors' contents."""

    prologue: bytes  # all that stands before the first tensor's header
    index: FileIndex  # as read_index will give it
    derivation: PasswordHash | None


@dataclass(frozen=True)
class WrittenDigests:
    """What vouches for a file that was written."""

    headers_sha256: str  # hex, of all tensor headers in file order
    tensors: tuple[bytes, ...]  # SHA-256 of each tensor in file order: HashCheck's


# (tensor, first byte of it, buffer to fill)
ReadTensor = Callable[[TensorRecord, int, memoryview], None]


def fresh_password_hash() -> PasswordHash:
    """How a new file's key comes from its passphrase: tensorizer's defaults and a random salt."""
    return PasswordHash(_MODERATE_PASSES, _MODERATE_MEMORY, os.urandom(SALT_SIZE))


def plan_file(
    specs: Iterable[TensorSpec], *, encrypted: bool, derivation: PasswordHash | None = None
) -> FilePlan:
    """Plans the file that holds ``specs`` in this order.

    ``derivation`` goes into each sealed header, for files that a passphrase opens. Raises
    ConfigurationError, naming the tensor, for what the format cannot hold.
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
    # Our own strict reader has to accept what we are about to write.
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
    """Writes the planned file to ``out``; gives the digests of its headers and tensors.

    ``read`` fills a buffer with bytes of a tensor, called by several threads; ``on_bytes`` is told
    of data written, in bytes; ``threads`` hash and encrypt, else as many as help.
    Memory: three times the largest tensor. Raises what ``read`` and ``out`` raise, ValueError if a
    key is given for a plain file or none for an encrypted one, and the key's errors.
    """
    if (key is not None) != plan.index.encrypted:
        raise ValueError("a key is needed for an encrypted file, and only for that")
    tensors = plan.index.tensors
    secret = _resolve(plan, key)
    headers = hashlib.sha256()
    out.write(plan.prologue)
    # One random start for the file, counted on from chunk to chunk: no nonce comes twice.
    start, used = os.urandom(NONCE_SIZE), 0
    # Tensors are made ready in threads, and written here, in their order.
    threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[tuple[TensorRecord, Future[_Made]]] = deque()
    digests: list[bytes] = []
    room = _TENSORS_AT_ONCE * max(tensor.length for tensor in tensors)
    held = 0
    making = _Making(plan, read, secret)

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
                while waiting and (held + record.length > room or len(waiting) == _MOST_WAITING):
                    write_next()
                held += record.length
                waiting.append((record, pool.submit(making.make, record, nonce_at(start, used))))
                used += _chunks(record.length)
            while waiting:
                write_next()
        except BaseException:
            making.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    out.write(bytes(TERMINATOR_SIZE))
    return WrittenDigests(headers.hexdigest(), tuple(digests))


class _Made(NamedTuple):
    """A tensor as it will stand in the file."""

    header: bytes
    data: memoryview
    sha256: bytes


class _Making:
    """Makes tensors as they will stand in the file; from several threads at once."""

    def __init__(self, plan: FilePlan, read: ReadTensor, secret: bytes | None) -> None:
        self._plan = plan
        self._read = read
        self._secret = secret
        self.stopped = False

    def make(self, record: TensorRecord, nonce: bytes) -> _Made:
        """The data is in memory of its own."""
        plan = self._plan
        template = _header(record, _unhashed(plan), _crypto(plan, record, nonce, b""))
        crypto_start, crypto_stop = _crypto_bounds(plan, record, template)
        hashed = template[:crypto_start] + template[crypto_stop:]
        sha256, crc32 = hashlib.sha256(hashed), zlib.crc32(hashed)
        secret = self._secret if record.length else None
        # From the kernel and back to it: malloc would keep what each thread once had.
        data = memoryview(mmap(-1, record.length) if record.length else b"")
        tags = bytearray()
        for begin in range(0, record.length, _STEP):
            if self.stopped:
                break  # nobody takes the result
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
        return _Made(header, data, sha256.digest())


def _resolve(plan: FilePlan, key: FileKey | None) -> bytes | None:
    """The 32 bytes, had from the header exactly as a reader will have them."""
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
            f"{len(spec.shape)} dimensions; {_MAX_NAME} and {_MAX_DIMENSIONS} can be stored."
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
        kind=KIND_STATE_DICT,
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
    """What index entry and header share: name, kind, dtype and shape follow each other in both."""
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
    """Where the crypto section, which no hash covers, stands in ``header``."""
    stop = len(header) - 8
    return stop - len(_crypto(plan, record, bytes(24), b"")), stop


def _unhashed(plan: FilePlan) -> bytes:
    return _hashes(plan.index.encrypted, 0, bytes(32))


def _hashes(encrypted: bool, crc32: int, sha256: bytes) -> bytes:
    """In plain files a CRC-32 and a SHA-256, as tensorizer writes them. In encrypted files none.

    A digest of the plaintext, in clear, lets anybody recognise a tensor that he knows, and try the
    values of a small one. tensorizer writes it all the same; its reader takes headers without
    (2.10.1 to 2.12.1). Ours stand in the manifest, sealed.
    """
    if encrypted:
        return b"\0"
    return struct.pack("<BBBIBB", 2, 0, 4, crc32, 1, 32) + sha256


def _crypto(plan: FilePlan, record: TensorRecord, nonce: bytes, tags: bytes) -> bytes:
    """The crypto section; nothing in plain files, no entries for a tensor without data."""
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
    """The file as far as it is known, as a source for read_index."""

    name = "The new file"

    def __init__(self, prologue: bytes, size: int) -> None:
        self._prologue = prologue
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return self._prologue[offset : offset + length].ljust(length, b"\0")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))
