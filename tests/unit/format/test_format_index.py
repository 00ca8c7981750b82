"""Does the index parser refuse every lie, quickly, and without allocating on its word?"""

from __future__ import annotations

import json
import sys
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensors_samples import FIXED_SIZE, Entry, MemorySource, compact, lying_file, write
from tensorserve.errors import CorruptError
from tensorserve.format import read_index
from tensorserve.format.index import MAX_METADATA


def _path(*parts: object) -> bytes:
    return b"\x1e" + json.dumps(parts, separators=(",", ":")).encode()


TWO = (Entry(b"a"), Entry(b"b"))

LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a .tensors file"),
    "other magic": (b"PK\3\4" + bytes(400), "not a .tensors file"),
    "safetensors": (b'\x10\0\0\0\0\0\0\0{"a":{}}', "not a .tensors file"),
    "only the magic": (b"|TZR|", "truncated: it is 5 bytes long"),
    "version 0": (lying_file(Entry(), file_version=0), "data version 0"),
    "version 6": (lying_file(Entry(), file_version=6), "data version 6"),
    "flag before version 4": (lying_file(Entry(), file_version=3, flags=1), "feature flags"),
    "unknown flag": (lying_file(Entry(), file_version=5, flags=4), "feature flags 0x4"),
    "high flag": (lying_file(Entry(), file_version=5, flags=1 << 255), "feature flags"),
    "versioned entries in version 4": (
        lying_file(Entry(version=1), file_version=4, flags=2),
        "feature flags",
    ),
    "reserved bytes": (lying_file(Entry(), reserved=1), "reserved"),
    "huge metadata": (lying_file(Entry(), metadata_length=2**63), "index alone would end at"),
    "largest metadata": (lying_file(Entry(), metadata_length=2**64 - 1), "index alone"),
    "metadata over the file": (lying_file(Entry(), metadata_length=500), "index alone"),
    "metadata cut short": (lying_file(*TWO, metadata_length=50), "cannot hold"),
    "metadata one byte short": (
        lying_file(Entry(), metadata_length=41),
        "only 23 are left",
    ),
    "metadata over the cap": (
        lying_file(Entry(), padding=bytes(MAX_METADATA), size=MAX_METADATA + 500),
        "over 16777216",
    ),
    "no tensors": (lying_file(padding=bytes(100)), "no tensors"),
    "huge count": (lying_file(Entry(), count=2**64 - 1), "cannot hold"),
    "one tensor too many": (lying_file(*TWO, count=3), "cannot hold"),
    "one tensor too many, with padding": (
        lying_file(*TWO, count=3, padding=bytes(64)),
        "the name of tensor 2 .* is empty",
    ),
    "one tensor too few": (lying_file(*TWO, count=1), "goes on after the 1 tensors"),
    "padding that is not zero": (lying_file(Entry(), padding=b"\0\1"), "goes on after"),
    "the same name twice": (lying_file(Entry(), Entry()), "two tensors are called 'weight'"),
    "two paths to one name": (
        lying_file(Entry(_path("a.b", "c"), kind=2), Entry(_path("a", "b.c"), kind=2)),
        r"two tensors are called 'a\.b\.c'",
    ),
    "empty name": (lying_file(Entry(b"")), "is empty"),
    "name not UTF-8": (lying_file(Entry(b"\xff\xfe")), "not UTF-8"),
    "path not JSON": (lying_file(Entry(b"\x1e[1,")), "not a JSON array"),
    "path an object": (lying_file(Entry(b'\x1e{"a":1}')), "array of keys"),
    "path empty": (lying_file(Entry(b"\x1e[]")), "array of keys"),
    "path a string": (lying_file(Entry(b'\x1e"abc"')), "array of keys"),
    "path with a negative index": (lying_file(Entry(_path("a", -1))), "something other"),
    "path with a fraction": (lying_file(Entry(_path("a", 1.5))), "something other"),
    "path with a truth value": (lying_file(Entry(_path("a", True))), "something other"),
    "path with not-a-number": (lying_file(Entry(b"\x1e[NaN]")), "something other"),
    "path within a path": (lying_file(Entry(_path("a", ["b"]))), "something other"),
    "path with a lone surrogate": (lying_file(Entry(b'\x1e["\\ud800"]')), "surrogate"),
    "path nested deeply": (lying_file(Entry(b"\x1e" + b"[" * 60_000)), "not a JSON array"),
    "path with an endless number": (
        lying_file(Entry(b"\x1e[" + b"9" * 9_000 + b"]")),
        "not a JSON",
    ),
    "path not ASCII": (lying_file(Entry("\x1e['ü']".encode())), "not a JSON array"),
    "unknown kind": (lying_file(Entry(kind=3)), "unknown kind 3"),
    "unknown entry version": (
        lying_file(Entry(version=2), file_version=5, flags=2),
        "unknown version 2",
    ),
    "unknown dtype": (lying_file(Entry(dtype=b"<f3")), "dtype '<f3' is not known"),
    "dtype not text": (lying_file(Entry(dtype=b"\xfff4")), "not text"),
    "object dtype": (lying_file(Entry(dtype=b"|O8")), "not known"),
    "big-endian dtype": (lying_file(Entry(dtype=b">f4")), "not known"),
    "opaque without a name": (lying_file(Entry(dtype=b"<V4\0")), "does not name a dtype"),
    "opaque with another module": (
        lying_file(Entry(dtype=b"<V4\0os.system")),
        "does not name a dtype",
    ),
    "opaque with no dtype": (lying_file(Entry(dtype=b"<V4\0torch.load")), "does not name a dtype"),
    "opaque twice": (lying_file(Entry(dtype=b"<V2\0torch.bfloat16\0x")), "does not name a dtype"),
    "opaque of another size": (lying_file(Entry(dtype=b"<V4\0torch.bfloat16")), "2 bytes an"),
    "opaque in other bytes": (lying_file(Entry(dtype=b"<f2\0torch.bfloat16")), "2 bytes an"),
    "shape too small": (lying_file(Entry(shape=(3,))), "takes 12 bytes, but .* says 16"),
    "shape too large": (lying_file(Entry(shape=(5,))), "takes 20 bytes"),
    "length without shape": (lying_file(Entry(shape=(0,))), "takes 0 bytes"),
    "shape that is 0 modulo 2^64": (
        lying_file(Entry(dtype=b"|u1", shape=(2**31, 2**31, 4), length=0), file_version=4),
        "impossible shape",
    ),
    "zero elements of impossible strides": (
        lying_file(Entry(shape=(2**31, 2**31, 2**31, 0), length=0)),
        "impossible shape",
    ),
    "no data before version 4": (lying_file(Entry(length=0), file_version=3), "has no data"),
    "length of 2^63": (
        lying_file(
            Entry(version=5, dtype=b"|u1", shape=(2**63,), length=2**63), file_version=5, flags=2
        ),
        "impossible shape",
    ),
    "length over the file": (
        lying_file(Entry(shape=(2**20,), length=2**22), size=2**19),
        "describes a file of",
    ),
    "length of exabytes": (
        lying_file(
            Entry(version=5, dtype=b"|u1", shape=(2**62,), length=2**62), file_version=5, flags=2
        ),
        "describes a file of",
    ),
    "gap before the first": (lying_file(Entry(header_offset=500)), "leaves a gap"),
    "header inside the index": (lying_file(Entry(header_offset=80)), "overlaps"),
    "header at the beginning": (lying_file(Entry(header_offset=0)), "overlaps"),
    "header beyond the file": (lying_file(Entry(header_offset=2**63)), "leaves a gap"),
    "tensors that overlap": (lying_file(Entry(b"a"), Entry(b"b", header_offset=230)), "overlaps"),
    "data before the header": (lying_file(Entry(header_length=-50)), "-50 bytes is not possible"),
    "header too short": (lying_file(Entry(header_length=20)), "20 bytes is not possible"),
    "shape of more digits than Python prints": (
        lying_file(
            Entry(version=5, dtype=b"|u1", shape=(2**64 - 1,) * 255, length=4),
            file_version=5,
            flags=2,
        ),
        "impossible shape",
    ),
    "header too long": (lying_file(Entry(header_length=5000)), "5000 bytes is not possible"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_index_is_refused_with_the_reason(lie: str) -> None:
    """Each lie alone is refused, by a message that names the file and says what is wrong."""
    data, match = LIES[lie]

    with pytest.raises(CorruptError, match=match) as caught:
        read_index(MemorySource(data))

    assert "memory:sample.tensors" in caught.value.message
    assert caught.value.hint


def test_the_sample_of_the_lies_is_itself_accepted() -> None:
    """Without a lie the same file passes: each refusal above is for its own reason."""
    index = read_index(MemorySource(lying_file(*TWO, padding=bytes(9))))

    assert [record.name for record in index.tensors] == ["a", "b"]


def test_no_read_is_made_on_the_word_of_a_length() -> None:
    """A metadata length beyond the file is refused by arithmetic."""
    source = MemorySource(lying_file(Entry(), metadata_length=2**40))

    with pytest.raises(CorruptError):
        read_index(source)

    assert source.reads == [(0, source.size)]


def test_a_tensors_entry_is_read_in_a_few_calls() -> None:
    """The index is read in every process of every start. 36 calls of Python's and C's functions."""
    count = 1_000
    entries = [
        Entry(
            f"model.layers.{i // 12}.block.{i % 12}.weight".encode(),
            0,
            b"<V2\0torch.bfloat16",
            (8,),
        )
        for i in range(count)
    ]
    source = MemorySource(lying_file(*entries, size=FIXED_SIZE + count * 300))
    data = source.data
    end = FIXED_SIZE + int.from_bytes(data[65:73], "little") + count * 96 + 8
    source = MemorySource(data[:end])
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        index = read_index(source)
    finally:
        sys.setprofile(None)

    assert len(index.tensors) == count
    assert calls / count < 40


SOUND = compact(write({"a.weight": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.int8)}), 16)
INDEX_END = read_index(MemorySource(SOUND)).tensors[0].header_offset

edits = st.lists(
    st.tuples(
        st.integers(5, INDEX_END - 1),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 8, bytes(8), b"\xff\xff", (2**63).to_bytes(8, "little")]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def _only_corrupt_error_and_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        read_index(MemorySource(data))
    except CorruptError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 1024 + 8 * len(data)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(edits)
def test_an_edited_index_gives_corrupt_error_and_little_memory(
    changes: list[tuple[int, bytes]],
) -> None:
    """Whatever is written into a sound index, at most CorruptError comes out."""
    data = bytearray(SOUND)
    for offset, new in changes:
        data[offset : offset + len(new)] = new
    _only_corrupt_error_and_little_memory(bytes(data))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 40), st.binary(max_size=600))
def test_random_metadata_gives_corrupt_error_and_little_memory(
    version: int, flags: int, count: int, metadata: bytes
) -> None:
    """Metadata of random bytes behind a plausible header gives CorruptError, never another."""
    file = lying_file(
        file_version=version,
        flags=flags if version >= 4 else 0,
        count=count,
        padding=metadata,
        size=2000,
    )
    _only_corrupt_error_and_little_memory(file)
