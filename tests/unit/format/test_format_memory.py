"""Does a lying length cost memory? Asked of the operating system, with a limit on the process."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from tensors_samples import FIXED_SIZE, Entry, lying_file

# Parses the file on stdin with 48 MiB of address space left, and says what came of it.
READ = """
import io, resource, sys, threading
from tensorserve.errors import CorruptError
from tensorserve.format import read_header, read_index

class Source:
    name, data = "stdin", sys.stdin.buffer.read()
    size = len(data)
    def read(self, offset, length):
        assert 0 <= offset <= offset + length <= self.size, "a read outside of the file"
        return self.data[offset : offset + length]

source = Source()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 48 * 2**20,) * 2)
try:
    index = read_index(source)
    for record in index.tensors:
        read_header(source, record, index)
except CorruptError:
    print("CorruptError")
else:
    print("accepted")
"""


def _sealed(cipher: bytes, length: int = 16) -> bytes:
    """An encrypted file of one tensor with that crypto entry, header and index agreeing."""
    entry = struct.pack("<Q", len(cipher)) + cipher
    section = struct.pack("<QH", 2 + len(entry), 1) + entry
    hashes = struct.pack("<HBBB", 35, 1, 1, 32) + bytes(32)
    body = struct.pack("<HBH", 0, 0, 1) + b"w\3|u1" + struct.pack("<BI", 1, length)
    body += hashes + section + struct.pack("<q", length)
    header = struct.pack("<Q", 8 + len(body)) + body
    index = lying_file(
        Entry(b"w", dtype=b"|u1", shape=(length,), length=length, header_length=len(header)),
        file_version=3,
    )
    start = FIXED_SIZE + struct.unpack_from("<Q", index, FIXED_SIZE - 8)[0]
    return index[:start] + header + bytes(length + 8)


def _cipher(count: int, chunk_size: int = 1024) -> bytes:
    return struct.pack("<HQ24sQ", 2, chunk_size, b"n" * 24, count) + b"t" * 16


HUGE = 2**62
LIES = {
    "count of tensors": lying_file(Entry(), count=2**64 - 1),
    "count of tensors, 2^32": lying_file(Entry(), count=2**32),
    "length of the index": lying_file(Entry(), metadata_length=2**64 - 1),
    "length of the index, 1 TiB": lying_file(Entry(), metadata_length=2**40),
    "length of a name": lying_file(Entry(), padding=b"\xff\xff" + bytes(64), count=2),
    "length of a tensor": lying_file(Entry(shape=(2**30,), length=2**32)),
    "length of a tensor, negative": lying_file(Entry(length=2**64 - 16)),
    "shape and length of exabytes": lying_file(
        Entry(version=5, dtype=b"|u1", shape=(HUGE,), length=HUGE), file_version=5, flags=2
    ),
    "shape of 255 dimensions": lying_file(Entry(shape=(2**32 - 1,) * 255, length=0)),
    "shape that is 0 modulo 2^64": lying_file(Entry(shape=(2**31, 2**31, 4), length=0)),
    "shape times dtype is not the length": lying_file(Entry(shape=(2**28,))),
    "tensors that overlap": lying_file(Entry(b"a"), Entry(b"b", header_offset=230)),
    "a gap of exabytes": lying_file(Entry(b"a"), Entry(b"b", header_offset=HUGE)),
    "header outside of the file": lying_file(Entry(header_offset=2**63)),
    "header of exabytes": lying_file(Entry(header_length=HUGE)),
    "header of exabytes, encrypted": lying_file(Entry(header_length=HUGE), file_version=3),
    "tags, 2^64 - 1": _sealed(_cipher(2**64 - 1)),
    "tags, so that 16 times as many is 16": _sealed(_cipher(2**60 + 1)),
    "tags, none": _sealed(_cipher(0)),
    "tags, two for one chunk": _sealed(_cipher(2)),
    "chunk size 0": _sealed(_cipher(1, 0)),
    "path of 60,000 brackets": lying_file(Entry(b"\x1e" + b"[" * 60_000)),
}


def _read(data: bytes) -> str:
    done = subprocess.run(
        [sys.executable, "-c", READ], input=data, capture_output=True, timeout=60, check=False
    )
    return done.stdout.decode().strip() or done.stderr.decode()


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_in_a_process_with_little_memory(lie: str) -> None:
    """CorruptError, not MemoryError, with 48 MiB to spare."""
    assert _read(LIES[lie]) == "CorruptError"


def test_the_sample_of_the_lies_is_accepted_there() -> None:
    """The limit is not what refuses."""
    assert _read(_sealed(_cipher(1))) == "accepted"


def test_the_limit_is_felt() -> None:
    """A process that does allocate on the word of a length ends with MemoryError."""
    data = lying_file(Entry())
    script = READ.replace("index = read_index(source)", "bytearray(2**27)")
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, timeout=60, check=False
    )

    assert b"MemoryError" in done.stderr


def test_an_index_costs_a_bounded_multiple_of_its_bytes() -> None:
    """20,000 of the smallest entries fit as well: no entry takes more than some 2 KiB."""
    count = 20_000
    entries = [
        Entry(f"{i:x}".encode(), dtype=b"|u1", shape=(), length=1, header_length=77)
        for i in range(count)
    ]
    data = lying_file(*entries, size=1)
    start = FIXED_SIZE + struct.unpack_from("<Q", data, FIXED_SIZE - 8)[0]
    data = data[:start].ljust(start + count * 78 + 8, b"\0")
    script = READ.replace("read_header(source, record, index)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, capture_output=True, timeout=60, check=False
    )

    assert done.stdout == b"accepted\n", done.stderr.decode()
