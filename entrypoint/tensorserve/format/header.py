"""What does a tensor's header say: its hashes, and how its data is encrypted?

Layout (tensorizer 2.12.1, serialization.py and _crypt_info.py), little-endian: u64 length of the
header, u16 module, u8 kind, u16+name, u8+dtype, u8+shape, u16+hashes, in encrypted files u64+crypto
section, i64 data length. Fields that are in the index too must be equal there.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Protocol

from tensorserve.crypto.backends import NONCE_SIZE, TAG_SIZE
from tensorserve.crypto.secretbox import (
    ALGORITHM_ARGON2ID13,
    SALT_SIZE,
    nonce_at,
)
from tensorserve.errors import CorruptError
from tensorserve.format.byte_reader import DAMAGED_HINT, BoundedReader
from tensorserve.format.index import MIN_CHUNK
from tensorserve.format.records import TensorRecord

Buffer = bytes | bytearray | memoryview  # collections.abc.Buffer came with Python 3.12

CRC32, SHA256 = "crc32", "sha256"
_HASHES = {0: (CRC32, 4), 1: (SHA256, 32)}
_ENTRY_KEY_DERIVATION, _ENTRY_CIPHER = 1, 2
_DERIVATION_PASSWORD_HASH = 1
_CHUNK_QUANTUM = 64


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """How a key is derived from a passphrase: arguments of derive_key, which checks them."""

    passes: int
    memory: int  # bytes
    salt: bytes


@dataclass(frozen=True, slots=True)
class ChunkedCipher:
    """The chunks of a tensor's data, each sealed with XSalsa20-Poly1305 and its own tag."""

    chunk_size: int  # bytes; ignored if there is a single tag: the whole tensor is one chunk then
    nonce: bytes  # of the first chunk
    tags: bytes  # 16 bytes for each chunk

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.tags) // TAG_SIZE

    def chunk_bounds(self, index: int, length: int) -> tuple[int, int]:
        """(start, stop) of chunk ``index`` in the tensor's ``length`` bytes of data.

        Raises IndexError.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"chunk {index} of {self.count}")
        if self.count == 1:
            return 0, length
        start = index * self.chunk_size
        return start, min(start + self.chunk_size, length)

    def chunk_tag(self, index: int) -> bytes:
        """The 16-byte tag of chunk ``index``."""
        return self.tags[index * TAG_SIZE : (index + 1) * TAG_SIZE]

    def chunk_nonce(self, index: int) -> bytes:
        """The 24-byte nonce of chunk ``index``."""
        return nonce_at(self.nonce, index)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor's header, checked against its record."""

    record: TensorRecord
    source_name: str
    hashes: tuple[tuple[str, bytes], ...]  # (CRC32 or SHA256, digest), over hashed + plaintext
    hashed: bytes  # the header as it is hashed: digests zeroed, crypto section left out
    chunks: ChunkedCipher | None  # None: the tensor is plain, or has no data
    key_derivation: PasswordHash | None  # None: sealed with a key, not a passphrase

    @property
    def sha256(self) -> bytes | None:
        """The header's SHA-256; None if an encrypted file omits it, as writer.py does."""
        return dict(self.hashes).get(SHA256)


class FileKey(Protocol):
    """Gives the 32-byte key for a header. ``origin`` says where the key came from, for messages."""

    @property
    def origin(self) -> str: ...
    @property
    def of_all_headers(self) -> bytes | None: ...  # the key; None if it depends on the header
    def for_header(self, header: TensorHeader) -> bytes: ...


def fixed_fields(record: TensorRecord) -> bytes:
    """What the index says of a tensor's header: its first fields, without the module's number,
    which is two bytes behind the first eight. loading/tensor_header.h compares with it.
    """
    dtype = record.raw_dtype.encode()
    dimensions, width = len(record.shape), "Q" if record.long_shape else "I"
    return b"".join(
        (
            struct.pack("<QBH", record.header_length, record.kind, len(record.raw_name)),
            record.raw_name,
            bytes([len(dtype)]),
            dtype,
            struct.pack(f"<B{dimensions}{width}", dimensions, *record.shape),
        )
    )


def parse_header(
    record: TensorRecord, data: Buffer, *, encrypted: bool, source_name: str = "file"
) -> TensorHeader:
    """Parses ``data``, the bytes [record.header_offset, record.data_offset) of the file.

    ``encrypted`` is FileIndex.encrypted. Raises CorruptError, naming source and tensor, if the
    header contradicts the index or itself, or if the data of an encrypted file is not sealed.
    """
    header = bytes(data)
    where = f"{source_name}: header of tensor {record.name!r}"
    reader = BoundedReader(header, where, base=record.header_offset)

    def check(holds: bool, problem: str) -> None:
        if not holds:
            raise CorruptError(f"{where}: {problem}.", hint=DAMAGED_HINT)

    stated = reader.u64("header length")
    check(
        stated == len(header) == record.header_length,
        f"is {len(header)} bytes long, says {stated}, and has {record.header_length} in the index",
    )
    reader.u16("module number")
    check(reader.u8("kind") == record.kind, "its kind is not the index's")
    name = reader.take(reader.u16("name length"), "name")
    check(name == record.raw_name, f"its name is {name!r}, not the index's")
    dtype = reader.take(reader.u8("dtype length"), "dtype")
    check(dtype == record.raw_dtype.encode(), f"its dtype is {dtype!r}, not the index's")
    shape = reader.shape(long=record.long_shape)
    check(shape == record.shape, f"its shape is {shape}, in the index {record.shape}")

    hashes_length = reader.u16("hashes length")
    hashes_offset = reader.offset
    hashes, zeroed = _parse_hashes(reader.take(hashes_length, "hashes"), where)
    # A plain tensor is checked by its digest only; a sealed one has tags.
    check(encrypted or SHA256 in dict(hashes), "it holds no SHA-256")
    chunks, key_derivation = None, None
    if encrypted:
        section = reader.take(reader.u64("crypto section length"), "crypto section")
        chunks, key_derivation = _parse_crypto(section, record.length, where)
        check(
            (chunks is not None) == (record.length > 0),
            "its data is not sealed, although the file is marked as encrypted"
            if chunks is None
            else "it describes sealed data, but the tensor has no data",
        )
    crypto_end = reader.offset
    length = reader.i64("data length")
    check(length == record.length, f"its data length is {length}, in the index {record.length}")
    reader.done("data length")
    return TensorHeader(
        record=record,
        source_name=source_name,
        hashes=hashes,
        hashed=header[:hashes_offset] + zeroed + header[crypto_end:],
        chunks=chunks,
        key_derivation=key_derivation,
    )


def _parse_hashes(section: bytes, where: str) -> tuple[tuple[tuple[str, bytes], ...], bytes]:
    """The hashes, and the section with its digests zeroed, as it is hashed."""
    reader = BoundedReader(section, f"{where}: hashes")
    zeroed = bytearray(section)
    found: dict[str, bytes] = {}
    for _ in range(reader.u8("number of hashes")):
        number, size = reader.u8("hash type"), reader.u8("hash size")
        kind, expected = _HASHES.get(number, ("", -1))
        if size != expected or kind in found:
            raise CorruptError(
                f"{where}: hash type {number} of {size} bytes is unknown or repeated.",
                hint=DAMAGED_HINT,
            )
        start = reader.offset
        found[kind] = reader.take(size, "hash")
        zeroed[start : reader.offset] = bytes(size)
    reader.done("last hash")
    return tuple(found.items()), bytes(zeroed)


def _parse_crypto(
    section: bytes, length: int, where: str
) -> tuple[ChunkedCipher | None, PasswordHash | None]:
    reader = BoundedReader(section, f"{where}: crypto section")
    cipher: ChunkedCipher | None = None
    derivation: PasswordHash | None = None
    for _ in range(reader.u16("number of entries")):
        entry = BoundedReader(
            reader.take(reader.u64("entry length"), "entry"), f"{where}: crypto entry"
        )
        kind = entry.u16("entry type")
        if kind == _ENTRY_KEY_DERIVATION and derivation is None:
            derivation = _parse_derivation(entry, where)
        elif kind == _ENTRY_CIPHER and cipher is None:
            cipher = _parse_cipher(entry, length, where)
        else:
            raise CorruptError(
                f"{where}: crypto entry of type {kind} is unknown or repeated.",
                hint=DAMAGED_HINT,
            )
        entry.done("entry")
    reader.done("last entry")
    if derivation is not None and cipher is None:
        raise CorruptError(f"{where}: it has a key derivation, but no cipher.", hint=DAMAGED_HINT)
    return cipher, derivation


def _parse_derivation(entry: BoundedReader, where: str) -> PasswordHash:
    method = entry.u16("derivation method")
    passes, memory = entry.u64("passes"), entry.u64("memory")
    algorithm = entry.u32("algorithm")
    salt = entry.take(entry.u16("salt length"), "salt")
    if (method, algorithm, len(salt)) != (
        _DERIVATION_PASSWORD_HASH,
        ALGORITHM_ARGON2ID13,
        SALT_SIZE,
    ):
        raise CorruptError(
            f"{where}: key derivation method {method}, algorithm {algorithm} with a salt of "
            f"{len(salt)} bytes is not known.",
            hint=DAMAGED_HINT,
        )
    return PasswordHash(passes=passes, memory=memory, salt=salt)


def _parse_cipher(entry: BoundedReader, length: int, where: str) -> ChunkedCipher:
    chunk_size = entry.u64("chunk size")
    nonce = entry.take(NONCE_SIZE, "nonce")
    count = entry.u64("number of tags")
    if chunk_size < MIN_CHUNK or chunk_size % _CHUNK_QUANTUM:
        raise CorruptError(
            f"{where}: a chunk size of {chunk_size} bytes is not possible.", hint=DAMAGED_HINT
        )
    if count not in {1, -(-length // chunk_size)}:
        raise CorruptError(
            f"{where}: {count} tags do not fit {length} bytes in chunks of {chunk_size}.",
            hint=DAMAGED_HINT,
        )
    return ChunkedCipher(chunk_size, nonce, entry.take(count * TAG_SIZE, "tags"))


class HashCheck:
    """Compares digests with the plaintext, which is given in pieces, in order."""

    def __init__(self, header: TensorHeader, expected: bytes | None = None) -> None:
        """``expected``: the manifest's SHA-256 (32 bytes), compared in addition to the header's."""
        self._header = header
        self._expected = expected
        self._sha256 = hashlib.sha256(header.hashed)
        # tensorizer writes a CRC-32 beside the SHA-256 in plain files only.
        self._with_crc32 = any(kind == CRC32 for kind, _ in header.hashes)
        self._crc32 = zlib.crc32(header.hashed)

    def update(self, plaintext: Buffer) -> None:
        """Hashes the next bytes of the tensor. Releases the GIL, except for short pieces."""
        self._sha256.update(plaintext)
        if self._with_crc32:
            self._crc32 = zlib.crc32(plaintext, self._crc32)

    def digest(self) -> bytes:
        """SHA-256 of header and plaintext so far (32 bytes), as tensorizer computes it."""
        return self._sha256.digest()

    def compare(self) -> None:
        """Raises CorruptError, naming source, tensor and digest, if any digest differs."""
        found = {CRC32: self._crc32.to_bytes(4, "little"), SHA256: self._sha256.digest()}
        for kind, digest in self._header.hashes:
            if found[kind] != digest:
                raise self._differs(f"the {kind} that its header gives")
        if self._expected is not None and self._expected != found[SHA256]:
            raise self._differs("the sha256 that the manifest gives")

    def finish(self) -> None:
        """As `compare`, and raises CorruptError if there is no SHA-256 to compare with."""
        require_digest(self._header, self._expected)
        self.compare()

    def _differs(self, what: str) -> CorruptError:
        tensor = f"{self._header.source_name}: tensor {self._header.record.name!r}"
        return CorruptError(f"{tensor} does not have {what}.", hint=DAMAGED_HINT)


def require_digest(header: TensorHeader, expected: bytes | None = None) -> None:
    """Raises CorruptError unless header or manifest have a SHA-256, which identifies the tensor."""
    if header.sha256 is None and expected is None:
        raise CorruptError(
            f"{header.source_name}: tensor {header.record.name!r} is sealed, but neither an "
            "authenticated manifest.json nor a SHA-256 shows that it is the one of this name.",
            hint="Restore the bundle's own manifest.json, or pack it again: digests or manifest "
            "may have been removed to exchange tensors. If nobody else could write to the bundle, "
            "set TENSORSERVE_VERIFY=tags, and add a manifest with `tensorserve sign`.",
        )


def verify_hashes(header: TensorHeader, plaintext: Buffer, expected: bytes | None = None) -> None:
    """Raises CorruptError unless there is a SHA-256 and all digests fit the whole ``plaintext``."""
    check = HashCheck(header, expected)
    check.update(plaintext)
    check.finish()
