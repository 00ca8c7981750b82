"""Is every damage to a file noticed, or without effect?"""

from __future__ import annotations

import functools
import struct

import pytest
import torch

from tensors_samples import (
    PASSPHRASE,
    FixedKey,
    MemorySource,
    compact,
    encryption,
    tensor_bytes,
    tensorizer_reads,
    we_read,
    write,
)
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import TagMismatchError, read_header, read_index, read_tensor
from tensorserve.secret import Secret

CONTENT = {
    "a": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "b": torch.tensor(7, dtype=torch.int32),
    "ab": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
}
META = {"m": torch.empty(3, 2, device="meta")}
LONG = {"l": torch.empty(2**32, device="meta")}

# The fixed part: magic 5, version 4, flags 32, data bytes 8, reserved 8, count 8, metadata 8.
VERSION, FLAGS, DATA_BYTES = 5, 9, range(41, 49)


def _bits(offsets: range) -> set[int]:
    return {8 * offset + bit for offset in offsets for bit in range(8)}


@functools.cache
def _sample(case: str) -> bytes:
    content = CONTENT | (META if "meta" in case else {}) | (LONG if "long" in case else {})
    kind = "passphrase" if "passphrase" in case else "key" if "key" in case else "plain"
    return compact(write(content, encryption(kind)))


def _key_of(data: bytes, case: str) -> FixedKey | None:
    """The 32 bytes that open the sample; a passphrase is derived once, not for every flip."""
    if "plain" in case:
        return None
    if "key" in case:
        return FixedKey()
    source = MemorySource(data)
    index = read_index(source)
    passphrase = parse_passphrase(Secret(PASSPHRASE))
    return FixedKey(passphrase.for_header(read_header(source, index.tensors[0], index)))


def _expected_unnoticed(case: str, *, verify: bool) -> set[int]:
    """The bits that nothing depends on, as (8 * offset + bit): all that a flip may leave quiet."""
    source = MemorySource(_sample(case))
    index = read_index(source)
    quiet = _bits(DATA_BYTES)  # a total that tensorizer itself calls inaccurate
    quiet |= _bits(range(source.size - 8, source.size))  # eight zeros; the index says where to stop
    if index.file_version == 4:
        quiet |= {8 * VERSION}  # version 5 without its flag means the same
    for record in index.tensors:
        start = record.header_offset
        if not verify:
            # The module's number; nothing reads it.
            quiet |= _bits(range(start + 8, start + 10))
        if index.file_version == 5 and not record.shape:
            # Whether dimensions take 4 bytes (entry version 1) or 8 (5), where there are none.
            entry = struct.pack("<IH", 1, len(record.raw_name)) + record.raw_name
            quiet |= {8 * source.data.index(entry) + 2}
        width = 8 if record.long_shape else 4
        at = start + 13 + len(record.raw_name) + 1 + len(record.raw_dtype)
        at += 1 + width * len(record.shape) + 2 + 1  # shape, length and number of hashes
        for _, digest in read_header(source, record, index).hashes:
            if not verify:
                quiet |= _bits(range(at + 2, at + 2 + len(digest)))
            at += 2 + len(digest)
        if index.encrypted and record.length:
            at += 8 + 2
            if "passphrase" in case:
                # Read with the key itself here: how it was derived does not matter then.
                # Entry length 8, type 2, method 2, passes 8, memory 8, algorithm 4, salt 2+16.
                quiet |= _bits(range(at + 12, at + 28)) | _bits(range(at + 34, at + 50))
                at += 50
            # Chunk size with a single tag: any multiple of 64 from 1024 on does as well.
            at += 8 + 2
            quiet |= {8 * at + bit for bit in range(6, 64) if 2**21 ^ 2**bit >= 1024}
    return quiet


@pytest.mark.parametrize("kind", ["plain", "key", "passphrase"])
def test_the_compact_sample_is_a_file_that_tensorizer_reads(kind: str) -> None:
    """The tests below are about damage to a sound file."""
    theirs = tensorizer_reads(_sample(kind), kind)

    assert {name: tensor_bytes(tensor) for name, tensor in theirs.items()} == {
        name: tensor_bytes(tensor) for name, tensor in CONTENT.items()
    }


@pytest.mark.parametrize(
    ("case", "verify"),
    [
        ("plain", True),
        ("key", True),
        ("key", False),
        ("key meta", True),
        ("passphrase", False),
        ("plain long", True),
    ],
)
def test_each_flipped_bit_is_noticed_or_changes_nothing(case: str, verify: bool) -> None:
    """Whatever bit flips: CorruptError, or the same names, kinds, dtypes, shapes and bytes.

    The bits of the second kind are listed exactly, so that the list cannot grow unseen.
    """
    sound = _sample(case)
    key = _key_of(sound, case)
    expected = we_read(sound, key, verify=verify)
    unnoticed = set()

    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = we_read(bytes(damaged), key, verify=verify)
        except CorruptError:
            continue
        assert found == expected, f"bit {bit % 8} of byte {bit // 8} changed what is read"
        unnoticed.add(bit)

    assert unnoticed == _expected_unnoticed(case, verify=verify)


def test_without_hashes_a_plain_file_is_not_protected() -> None:
    """What verification is for: a plain file's data has nothing else to vouch for it."""
    damaged = bytearray(_sample("plain"))
    damaged[-9] ^= 1

    assert we_read(bytes(damaged), verify=False)["ab"] != we_read(_sample("plain"))["ab"]
    with pytest.raises(CorruptError, match=r"memory:sample\.tensors: tensor 'ab' .* crc32"):
        we_read(bytes(damaged))


@pytest.mark.parametrize("case", ["plain", "key", "key meta", "plain long"])
def test_each_truncation_is_noticed_at_the_index(case: str) -> None:
    """A file cut at any offset is refused before any tensor is read."""
    sound = _sample(case)

    for size in range(len(sound)):
        with pytest.raises(CorruptError):
            read_index(MemorySource(sound[:size]))


def test_a_truncated_file_is_told_with_both_sizes() -> None:
    """The reader sees how much is missing."""
    sound = _sample("plain")
    match = f"is {len(sound) - 5} bytes long, but its index describes a file of {len(sound)}"

    with pytest.raises(CorruptError, match=match):
        read_index(MemorySource(sound[:-5]))


def test_a_file_with_bytes_appended_is_refused() -> None:
    """All bytes of a file are accounted for."""
    with pytest.raises(CorruptError, match="appended"):
        read_index(MemorySource(_sample("plain") + b"\0"))


def test_tensors_in_each_others_place_are_noticed() -> None:
    """Swapping two tensors of the same length is noticed by their names in the headers."""
    content = {"one": torch.ones(4), "two": torch.zeros(4)}
    data = bytearray(write(content))
    index = read_index(MemorySource(bytes(data)))
    one, two = index.tensors
    first = bytes(data[one.header_offset : one.end])
    data[one.header_offset : one.end] = data[two.header_offset : two.end]
    data[two.header_offset : two.end] = first

    with pytest.raises(CorruptError, match="its name is b'two', not the index's"):
        we_read(bytes(data))


def test_chunks_cannot_be_cut_off() -> None:
    """Fewer tags than the data needs are refused before anything is decrypted."""
    data = bytearray(write({"x": torch.zeros(3 * 2**20)}, encryption("key")))
    record = read_index(MemorySource(bytes(data))).tensors[0]
    tags = record.data_offset - 8 - 6 * 16 - 8
    assert struct.unpack_from("<Q", data, tags) == (6,)
    struct.pack_into("<Q", data, tags, 5)

    with pytest.raises(CorruptError, match="5 tags do not fit"):
        we_read(bytes(data), FixedKey())


def test_a_damaged_chunk_is_named() -> None:
    """The message says which chunk of which tensor of which file, and where it begins."""
    data = bytearray(write({"x": torch.zeros(3 * 2**20)}, encryption("key")))
    record = read_index(MemorySource(bytes(data))).tensors[0]
    data[record.data_offset + 2**21 + 5] ^= 1
    match = rf"memory:sample.tensors: chunk 1 of tensor 'x' \(offset {record.data_offset + 2**21}\)"

    with pytest.raises(TagMismatchError, match=match):
        we_read(bytes(data), FixedKey())


def test_plain_data_in_an_encrypted_file_is_refused() -> None:
    """A tensor without a crypto entry is never taken as it is in a file that says "encrypted"."""
    data = bytearray(compact(write({"x": torch.ones(4), **META}, encryption("key"))))
    index = read_index(MemorySource(bytes(data)))
    record, meta = index.tensors
    header = data[record.header_offset : record.data_offset]
    section = bytes(data[meta.data_offset - 18 : meta.data_offset - 8])
    assert section == struct.pack("<QH", 2, 0)
    # Put the meta tensor's empty section into the sealed tensor's header.
    cut = len(header) - 8 - (8 + 2 + 8 + 2 + 8 + 24 + 8 + 16)
    forged = struct.pack("<Q", cut + 18) + header[8:cut] + section + header[-8:]
    moved = record.data_offset - record.header_offset - len(forged)
    body = forged + bytes(16) + data[meta.header_offset :]
    block = data[: record.header_offset]
    places = [record, meta]
    for place in places:
        old = struct.pack("<QQ", place.header_offset, place.data_offset)
        new_header = place.header_offset - (moved if place is meta else 0)
        at = block.index(old)
        block[at : at + 16] = struct.pack("<QQ", new_header, place.data_offset - moved)

    with pytest.raises(CorruptError, match="not sealed"):
        we_read(bytes(block + body), FixedKey())


def test_an_encrypted_file_without_a_key_is_misconfigured() -> None:
    """Nothing is wrong with the file."""
    source = MemorySource(_sample("key"))
    index = read_index(source)

    with pytest.raises(ConfigurationError, match="no key is given"):
        read_tensor(source, index.tensors[0], index, None)


def test_the_digest_changes_with_any_byte_of_the_index() -> None:
    """A manifest binds names, dtypes, shapes and order by it; tensor data is not part of it."""
    sound = _sample("plain")
    end = read_index(MemorySource(sound)).tensors[0].header_offset
    other_total = bytearray(sound)
    other_total[DATA_BYTES[0]] ^= 1
    other_data = bytearray(sound)
    other_data[end + 40] ^= 1

    digests = {
        read_index(MemorySource(bytes(data))).digest for data in (sound, other_total, other_data)
    }

    assert len(digests) == 2
