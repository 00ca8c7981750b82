"""Does the header parser refuse every lie, and does a header's hash vouch for the plaintext?"""

from __future__ import annotations

import functools
import hashlib
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensors_samples import MemorySource, encryption, write
from tensorserve.errors import CorruptError
from tensorserve.format import (
    HashCheck,
    TensorHeader,
    TensorRecord,
    parse_header,
    read_index,
    verify_hashes,
)

LENGTH = 5000
PLAINTEXT = bytes(i % 251 for i in range(LENGTH))
SHA256_ENTRY = bytes([1, 32]) + bytes(32)
CRC32_ENTRY = bytes([0, 4]) + bytes(4)


def _entry(kind: int, body: bytes) -> bytes:
    return struct.pack("<QH", len(body) + 2, kind) + body


def _cipher(chunk_size: int = 1024, tags: int = 5, claimed: int | None = None) -> bytes:
    count = tags if claimed is None else claimed
    return _entry(2, struct.pack("<Q24sQ", chunk_size, b"n" * 24, count) + b"t" * 16 * tags)


def _derivation(method: int = 1, algorithm: int = 2, salt: bytes = b"s" * 16) -> bytes:
    return _entry(1, struct.pack("<HQQIH", method, 1, 8192, algorithm, len(salt)) + salt)


def _section(*entries: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<H", len(entries) if claimed is None else claimed) + b"".join(entries)


def _header(
    *,
    hashes: bytes = b"\1" + SHA256_ENTRY,
    hashes_length: int | None = None,
    crypto: bytes | None = None,
    crypto_length: int | None = None,
    length: int = LENGTH,
    name: bytes = b"w",
    extra: bytes = b"",
) -> bytes:
    body = struct.pack("<HBH", 0, 0, len(name)) + name + b"\3|u1" + struct.pack("<BI", 1, LENGTH)
    body += struct.pack("<H", len(hashes) if hashes_length is None else hashes_length) + hashes
    if crypto is not None:
        body += struct.pack("<Q", len(crypto) if crypto_length is None else crypto_length) + crypto
    body += extra + struct.pack("<q", length)
    return struct.pack("<Q", len(body) + 8) + body


def _parse(header: bytes, *, encrypted: bool = False) -> TensorHeader:
    record = TensorRecord(
        name="w",
        kind=0,
        dtype="uint8",
        shape=(LENGTH,),
        header_offset=1000,
        data_offset=1000 + len(header),
        length=LENGTH,
        raw_dtype="|u1",
        raw_name=b"w",
        is_meta=False,
        long_shape=False,
    )
    return parse_header(record, header, encrypted=encrypted, source_name="s3://b/m.tensors")


PLAIN_LIES = {
    "length says more": (struct.pack("<Q", 2**63) + _header()[8:], "says 9223372036854775808"),
    "another name": (_header(name=b"v"), "name is b'v'"),
    "a longer name": (_header(name=b"w" * 300), "not the index's"),
    "another data length": (_header(length=LENGTH - 1), "data length is 4999"),
    "negative data length": (_header(length=-LENGTH), "data length is -5000"),
    "bytes before the data length": (_header(extra=bytes(4)), "its data length is"),
    "bytes after the data length": (
        struct.pack("<Q", len(_header()) + 4) + _header()[8:] + bytes(4),
        "4 bytes too many",
    ),
    "hashes beyond the header": (_header(hashes_length=65535), "only 43 are left"),
    "hashes empty": (_header(hashes=b""), "number of hashes"),
    "no hash": (_header(hashes=b"\0"), "no SHA-256"),
    "only a CRC": (_header(hashes=b"\1" + CRC32_ENTRY), "no SHA-256"),
    "more hashes than there are": (_header(hashes=b"\xff" + SHA256_ENTRY), "hash type at"),
    "fewer hashes than there are": (_header(hashes=b"\1" + SHA256_ENTRY + CRC32_ENTRY), "too many"),
    "the same hash twice": (_header(hashes=b"\2" + SHA256_ENTRY * 2), "repeated"),
    "unknown hash": (_header(hashes=b"\1\2\x20" + bytes(32)), "unknown"),
    "short hash": (_header(hashes=b"\1\1\x10" + bytes(16)), "of 16 bytes"),
    "a crypto section in a plain file": (_header(crypto=_section(_cipher())), "data length"),
    "empty header": (b"", "header length"),
}

SEALED_LIES = {
    "no crypto section": (_header(), "crypto section"),
    "empty crypto section": (_header(crypto=_section()), "not sealed"),
    "section of no bytes": (_header(crypto=b""), "number of entries"),
    "section beyond the header": (
        _header(crypto=_section(_cipher()), crypto_length=2**64 - 1),
        "crypto section",
    ),
    "too many entries claimed": (_header(crypto=_section(_cipher(), claimed=65535)), "entry"),
    "too few entries claimed": (_header(crypto=_section(_cipher(), claimed=0)), "too many"),
    "entry beyond its section": (
        _header(crypto=_section(struct.pack("<Q", 2**62) + _cipher()[8:])),
        "claims 4611686018427387904 bytes",
    ),
    "entry longer than its content": (
        _header(crypto=_section(_entry(2, _cipher()[10:] + b"x"))),
        "too many",
    ),
    "two ciphers": (_header(crypto=_section(_cipher(), _cipher())), "repeated"),
    "two derivations": (
        _header(crypto=_section(_derivation(), _derivation(), _cipher())),
        "repeated",
    ),
    "a derivation alone": (_header(crypto=_section(_derivation())), "no cipher"),
    "unknown entry": (_header(crypto=_section(_entry(3, bytes(40)))), "type 3 is unknown"),
    "unknown derivation": (_header(crypto=_section(_derivation(2), _cipher())), "not known"),
    "unknown algorithm": (
        _header(crypto=_section(_derivation(algorithm=1), _cipher())),
        "algorithm 1",
    ),
    "short salt": (_header(crypto=_section(_derivation(salt=b"s"), _cipher())), "salt of 1 bytes"),
    "chunk size 0": (_header(crypto=_section(_cipher(0, 1))), "chunk size of 0"),
    "chunk size below 1024": (_header(crypto=_section(_cipher(512, 10))), "chunk size of 512"),
    "chunk size not of 64": (_header(crypto=_section(_cipher(1025, 5))), "chunk size of 1025"),
    "a tag too few": (_header(crypto=_section(_cipher(tags=4))), "4 tags do not fit"),
    "a tag too many": (_header(crypto=_section(_cipher(tags=6))), "6 tags do not fit"),
    "no tags": (_header(crypto=_section(_cipher(tags=0))), "0 tags do not fit"),
    "tags claimed beyond the entry": (
        _header(crypto=_section(_cipher(tags=1, claimed=5))),
        "tags at",
    ),
    "2^64 tags claimed": (
        _header(crypto=_section(_cipher(tags=1, claimed=2**64 - 1))),
        "do not fit",
    ),
}


@pytest.mark.parametrize("lie", PLAIN_LIES)
def test_a_lying_header_is_refused_with_the_reason(lie: str) -> None:
    """Each lie alone is refused, naming file, tensor and what is wrong."""
    header, match = PLAIN_LIES[lie]

    with pytest.raises(CorruptError, match=match) as caught:
        _parse(header)

    assert "s3://b/m.tensors: header of tensor 'w'" in caught.value.message


@pytest.mark.parametrize("lie", SEALED_LIES)
def test_a_lying_crypto_section_is_refused_with_the_reason(lie: str) -> None:
    """Each lie alone is refused, naming file, tensor and what is wrong."""
    header, match = SEALED_LIES[lie]

    with pytest.raises(CorruptError, match=match) as caught:
        _parse(header, encrypted=True)

    assert "s3://b/m.tensors: header of tensor 'w'" in caught.value.message


def test_the_samples_of_the_lies_are_themselves_accepted() -> None:
    """Without a lie the same headers pass."""
    sealed = _parse(_header(crypto=_section(_derivation(), _cipher())), encrypted=True)

    assert _parse(_header()).chunks is None
    assert sealed.chunks is not None
    assert (sealed.chunks.chunk_size, sealed.chunks.count) == (1024, 5)
    assert sealed.key_derivation is not None
    assert (sealed.key_derivation.passes, sealed.key_derivation.memory) == (1, 8192)


def test_a_single_tag_fits_any_length() -> None:
    """Then the whole tensor is one box."""
    header = _parse(_header(crypto=_section(_cipher(tags=1))), encrypted=True)

    assert header.chunks is not None
    assert header.chunks.chunk_bounds(0, LENGTH) == (0, LENGTH)


def _with_hashes(plaintext: bytes, *, crypto: bytes | None = None) -> bytes:
    """A header whose hashes are right, computed here as the format defines them."""
    template = _header(hashes=b"\2" + CRC32_ENTRY + SHA256_ENTRY, crypto=crypto)
    hashed = template if crypto is None else template[: -16 - len(crypto)] + template[-8:]
    sha256 = hashlib.sha256(hashed + plaintext).digest()
    crc32 = zlib.crc32(hashed + plaintext).to_bytes(4, "little")
    hashes = b"\2" + CRC32_ENTRY[:2] + crc32 + SHA256_ENTRY[:2] + sha256
    return _header(hashes=hashes, crypto=crypto)


@pytest.mark.parametrize("crypto", [None, _section(_cipher())])
def test_hashes_cover_header_and_plaintext_not_the_crypto_part(
    crypto: bytes | None,
) -> None:
    """Digests count as zeros in what is hashed."""
    header = _parse(_with_hashes(PLAINTEXT, crypto=crypto), encrypted=crypto is not None)

    verify_hashes(header, PLAINTEXT)


@pytest.mark.parametrize("damage", [PLAINTEXT[:-1], PLAINTEXT + b"\0", b"\1" + PLAINTEXT[1:]])
def test_other_plaintext_fails_its_hashes(damage: bytes) -> None:
    """A byte less, a byte more, a byte changed."""
    header = _parse(_with_hashes(PLAINTEXT))

    with pytest.raises(CorruptError, match=r"s3://b/m.tensors: tensor 'w' does not have the crc32"):
        verify_hashes(header, damage)


def test_hashes_can_be_checked_in_pieces() -> None:
    """A pipeline hashes chunk by chunk."""
    check = HashCheck(_parse(_with_hashes(PLAINTEXT)))

    for start in range(0, LENGTH, 700):
        check.update(memoryview(PLAINTEXT)[start : start + 700])

    check.finish()


@functools.cache
def _real(kind: str) -> tuple[TensorRecord, bytes]:
    source = MemorySource(write({"w": torch.zeros(2**20)}, encryption(kind)))
    record = read_index(source).tensors[0]
    return record, source.read(record.header_offset, record.header_length)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["plain", "key", "passphrase"]),
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(st.binary(min_size=1, max_size=9), st.just(b"\xff" * 8)),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_an_edited_header_gives_corrupt_error_and_little_memory(
    kind: str, changes: list[tuple[float, bytes]]
) -> None:
    """Whatever is written into a real header, at most CorruptError comes out."""
    record, sound = _real(kind)
    header = bytearray(sound)
    for place, new in changes:
        offset = int(place * len(sound))
        header[offset : offset + len(new)] = new
    tracemalloc.start()
    try:
        parse_header(record, header, encrypted=kind != "plain")
    except CorruptError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 1024
