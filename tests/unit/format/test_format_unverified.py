"""Which changes does nothing catch, where hashes are not checked, and what catches those?

tests/unit/format/test_format_damage.py lists the bits that may flip without effect; here are the
flips that do have one, where TENSORSERVE_VERIFY is not "hashes".
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from tensorizer import TensorSerializer

from tensors_samples import (
    PASSPHRASE,
    FixedKey,
    MemorySource,
    compact,
    encryption,
    tensorizer_reads,
    we_read,
    write,
)
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.crypto import secretbox
from tensorserve.errors import CorruptError, TensorserveError
from tensorserve.format import read_header, read_index
from tensorserve.secret import Secret

CONTENT = {
    "a": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "b": torch.tensor(7, dtype=torch.int32),
    "ab": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
}


@functools.cache
def _sample(kind: str) -> bytes:
    return compact(write(CONTENT, encryption(kind)))


# Index: name, kind, dtype, shape. Header: kind, name, dtype, shape. (what stands there, by what it
# is replaced), each to be found in both or once in each.
RELABELLED = {
    "name": [(b"\2\0ab", b"\2\0xy")],
    "kind": [(b"\2\0ab\2\3|u1", b"\2\0ab\1\3|u1"), (b"\2\2\0ab\3|u1", b"\1\2\0ab\3|u1")],
    "dtype": [(b"\3|u1", b"\3|i1")],
    "shape": [(b"|u1\2\2\0\0\0\3\0\0\0", b"|u1\2\3\0\0\0\2\0\0\0")],
}


def _relabelled(kind: str, field: str) -> bytes:
    """The sample with one field of a tensor changed alike in the index and in its header."""
    data, places = _sample(kind), 0
    for old, new in RELABELLED[field]:
        assert len(old) == len(new)
        places += data.count(old)
        data = data.replace(old, new)
    assert places == 2
    return data


@pytest.mark.parametrize("field", RELABELLED)
@pytest.mark.parametrize("kind", ["plain", "key"])
def test_no_tag_covers_a_tensors_name_and_shape(kind: str, field: str) -> None:
    """Changed alike in index and header, it passes every tag, and fails the tensor's SHA-256.

    So it does in tensorizer. Without the hashes, the digest of the index is what tells: a manifest
    holds it.
    """
    forged = _relabelled(kind, field)
    key = FixedKey() if kind == "key" else None
    sound = we_read(_sample(kind), key)

    found = we_read(forged, key, verify=False)

    assert found != sound
    assert [entry[3] for entry in found.values()] == [entry[3] for entry in sound.values()]
    with pytest.raises(CorruptError, match=r"does not have the (sha256|crc32)"):
        we_read(forged, key)
    with pytest.raises(Exception, match=r"failed (SHA256|CRC32) verification"):
        tensorizer_reads(forged, kind)
    assert read_index(MemorySource(forged)).digest != read_index(MemorySource(_sample(kind))).digest


def test_a_plain_file_with_forged_hashes_passes_every_check() -> None:
    """Its hashes have no secret: they are for damage, not against people. Only encrypted files,
    or a manifest from elsewhere, are."""
    data = bytearray(_sample("plain"))
    source = MemorySource(bytes(data))
    index = read_index(source)
    record = index.tensors[-1]
    data[record.end - 1] ^= 1
    header = read_header(source, record, index)
    plaintext = bytes(data[record.data_offset : record.end])
    for name, digest in header.hashes:
        new = (
            hashlib.sha256(header.hashed + plaintext).digest()
            if name == "sha256"
            else zlib.crc32(header.hashed + plaintext).to_bytes(4, "little")
        )
        at = data.index(digest)
        data[at : at + len(digest)] = new

    assert we_read(bytes(data))["ab"] != we_read(_sample("plain"))["ab"]


def test_two_sealed_tensors_cannot_be_exchanged_with_headers() -> None:
    """Data, nonce and tag moved to another tensor's place still open: the tag knows no place.

    The header's name gives it away; renamed as well, the SHA-256 over the header does.
    """
    content = {"one": torch.ones(4), "two": torch.zeros(4)}
    data = compact(write(content, encryption("key")))
    index = read_index(MemorySource(data))
    one, two = (data[record.header_offset : record.end] for record in index.tensors)
    start, end = index.tensors[0].header_offset, index.tensors[1].end
    moved = data[:start] + two + one + data[end:]
    renamed = data[:start] + two.replace(b"two", b"one") + one.replace(b"one", b"two") + data[end:]

    with pytest.raises(CorruptError, match="not the index's"):
        we_read(moved, FixedKey(), verify=False)
    assert we_read(renamed, FixedKey(), verify=False)["one"][3] == bytes(16)
    with pytest.raises(CorruptError, match="does not have the sha256"):
        we_read(renamed, FixedKey())


def test_each_flip_in_a_plain_file_leaves_all_but_the_data_right() -> None:
    """Without hashes exactly the data's bits can change what is read."""
    sound = _sample("plain")
    expected = we_read(sound)
    source = MemorySource(sound)
    data_bits = {
        8 * offset + bit
        for record in read_index(source).tensors
        for offset in range(record.data_offset, record.end)
        for bit in range(8)
    }
    changed = set()

    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = we_read(bytes(damaged), verify=False)
        except CorruptError:
            continue
        assert [(n, *entry[:3]) for n, entry in found.items()] == [
            (n, *entry[:3]) for n, entry in expected.items()
        ]
        if found != expected:
            changed.add(bit)

    assert changed == data_bits


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_each_flip_in_a_chunk_of_several_is_noticed(chunk: int) -> None:
    """Ciphertext, nonce and tags of a tensor in three chunks: no flip anywhere in them passes."""
    data = _many_chunks()
    source = MemorySource(data)
    index = read_index(source)
    record = index.tensors[0]
    chunks = read_header(source, record, index).chunks
    assert chunks is not None
    assert chunks.count == 3
    start, stop = chunks.chunk_bounds(chunk, record.length)
    tags = data.index(chunks.tags) + 16 * chunk
    nonce = data.index(chunks.nonce)
    offsets = [
        *range(record.data_offset + start, record.data_offset + stop),
        *range(tags, tags + 16),
        *range(nonce, nonce + 24),
    ]

    for number, offset in enumerate(offsets):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << number % 8
        with pytest.raises(CorruptError, match="fails authentication"):
            we_read(bytes(damaged), FixedKey(), verify=False)


@functools.cache
def _many_chunks() -> bytes:
    """A tensor in chunks of 1 KiB, which tensorizer would make 2 MiB large."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tensors"
        serializer = TensorSerializer(path, encryption=encryption("key"))
        serializer._crypt_chunk_size = 1024
        serializer.write_state_dict({"x": torch.arange(2500, dtype=torch.int32).to(torch.uint8)})
        serializer.close()
        return compact(path.read_bytes())


def test_chunks_cannot_change_places() -> None:
    """Ciphertext and tag moved together to another chunk's place meet another nonce there."""
    data = bytearray(_many_chunks())
    source = MemorySource(bytes(data))
    index = read_index(source)
    record = index.tensors[0]
    chunks = read_header(source, record, index).chunks
    assert chunks is not None
    at, tags = record.data_offset, data.index(chunks.tags)
    first, second = bytes(data[at : at + 1024]), bytes(data[at + 1024 : at + 2048])
    data[at : at + 2048] = second + first
    data[tags : tags + 32] = chunks.chunk_tag(1) + chunks.chunk_tag(0)

    with pytest.raises(CorruptError, match="chunk 0 of tensor 'x'"):
        we_read(bytes(data), FixedKey(), verify=False)


def test_each_flip_in_how_a_key_is_derived_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Salt, passes, memory, method, algorithm: another key comes out, or none.

    Argon2 counts its memory in KiB, so the ten lowest bits of the memory's bytes mean nothing.
    The limits are lowered, so that a flip does not cost gigabytes and minutes here.
    """
    monkeypatch.setattr(secretbox, "MAX_DERIVATION_MEMORY", 64 * 1024)
    monkeypatch.setattr(secretbox, "MAX_DERIVATION_PASSES", 8)
    sound = _sample("passphrase")
    source = MemorySource(sound)
    index = read_index(source)
    derivation = read_header(source, index.tensors[0], index).key_derivation
    assert derivation is not None
    end = sound.index(derivation.salt) + 16
    begin = end - 16 - 2 - 4 - 8 - 8 - 2 - 2 - 8 - 2 - 8  # all of the crypto section before it
    memory = end - 16 - 2 - 4 - 8
    expected = we_read(sound, parse_passphrase(Secret(PASSPHRASE)))
    unnoticed = []

    for bit in range(8 * begin, 8 * end):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = we_read(bytes(damaged), parse_passphrase(Secret(PASSPHRASE)), verify=False)
        except TensorserveError:
            continue
        assert found == expected
        unnoticed.append(bit)

    assert unnoticed == [8 * memory + bit for bit in range(10)]


@pytest.mark.parametrize("kind", ["plain", "key", "passphrase"])
def test_each_truncation_is_one_of_our_errors_whatever_it_cuts(kind: str) -> None:
    """Also where the source still claims the whole size, and reads end early with zeros."""
    sound = _sample(kind)
    key = FixedKey() if kind == "key" else None
    if kind == "passphrase":
        key = FixedKey(_derived(sound))
    expected = we_read(sound, key)

    for size in range(len(sound)):
        with pytest.raises(CorruptError):
            we_read(sound[:size], key)
        padded = sound[:size].ljust(len(sound), b"\0")
        try:
            found = we_read(padded, key)
        except CorruptError:
            continue
        assert found == expected
        assert padded == sound  # only the zeros at the end were cut


def _derived(data: bytes) -> bytes:
    source = MemorySource(data)
    index = read_index(source)
    header = read_header(source, index.tensors[0], index)
    return parse_passphrase(Secret(PASSPHRASE)).for_header(header)
