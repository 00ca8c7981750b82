"""What somebody can write who has no key: it needs the format, and nothing secret."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorserve.format import FileIndex, read_index
from tensorserve.sources.local import LocalSource

MANIFEST = "manifest.json"
_FIXED = 73  # bytes before the index


def relabel(path: Path, one: str, other: str) -> None:
    """The two tensors of a .tensors file change names, in the index and in their headers."""
    a, b = one.encode(), other.encode()
    assert len(a) == len(b)
    data = path.read_bytes()
    assert (data.count(a), data.count(b)) == (2, 2)
    nobody = b"\xff" * len(a)
    path.write_bytes(data.replace(a, nobody).replace(b, a).replace(nobody, b))


def cut_digests(path: Path) -> None:
    """No header of the file has a digest any more."""
    data, index = path.read_bytes(), index_of(path)
    bodies = []
    for record in index.tensors:
        header = data[record.header_offset : record.data_offset]
        at = 8 + 2 + 1
        at += 2 + struct.unpack_from("<H", header, at)[0]
        at += 1 + header[at]
        at += 1 + header[at] * (8 if record.long_shape else 4)
        after = at + 2 + struct.unpack_from("<H", header, at)[0]
        rest = header[8:at] + struct.pack("<HB", 1, 0) + header[after:]
        bodies.append(struct.pack("<Q", 8 + len(rest)) + rest)
    start = index.tensors[0].header_offset
    head = bytearray(data[:start])
    at, moved = _FIXED, start
    for record, body in zip(index.tensors, bodies, strict=True):
        old = struct.pack("<QQ", record.header_offset, record.data_offset)
        at = head.index(old, at)
        struct.pack_into("<QQ", head, at, moved, moved + len(body))
        moved += len(body) + record.length
    tensors = [
        body + data[record.data_offset : record.end]
        for record, body in zip(index.tensors, bodies, strict=True)
    ]
    path.write_bytes(bytes(head) + b"".join(tensors) + bytes(8))


def nothing_sealed(name: str) -> bytes:
    """A .tensors file that says that it is encrypted: one tensor without elements, and its digest.

    There are no data to seal, so no key is needed to write it.
    """
    raw, dtype = name.encode(), b"<f4"
    called = struct.pack("<H", len(raw)) + raw
    shape = struct.pack("<B3sBI", len(dtype), dtype, 1, 0)
    size = 8 + 3 + len(called) + len(shape) + 2 + 35 + 8 + 2 + 8
    before = struct.pack("<QHB", size, 0, 0) + called + shape + struct.pack("<HBBB", 35, 1, 1, 32)
    length = struct.pack("<q", 0)
    digest = hashlib.sha256(before + bytes(32) + length).digest()
    header = before + digest + struct.pack("<QH", 2, 0) + length
    start = _FIXED + 4096
    entry = called + b"\0" + shape + struct.pack("<QQQ", start, start + size, 0)
    fixed = b"|TZR|" + struct.pack("<IQ24xQ8xQQ", 4, 1, 0, 1, 4096)
    return fixed + entry.ljust(4096, b"\0") + header + bytes(8)


def known_plaintext(path: Path, name: str, plain: bytes) -> None:
    """Of the sealed file, the one tensor whose plaintext is known, with the digest of it."""
    data = path.read_bytes()
    record = next(record for record in index_of(path).tensors if record.name == name)
    header = data[record.header_offset : record.data_offset]
    at = 8 + 2 + 1
    at += 2 + struct.unpack_from("<H", header, at)[0]
    at += 1 + header[at]
    at += 1 + header[at] * 4
    rest = header[at + 2 + struct.unpack_from("<H", header, at)[0] :]
    crypto = 8 + struct.unpack_from("<Q", rest)[0]
    size = at + 2 + 35 + len(rest)
    before = struct.pack("<Q", size) + header[8:at] + struct.pack("<HBBB", 35, 1, 1, 32)
    digest = hashlib.sha256(before + bytes(32) + rest[crypto:] + plain).digest()
    start = _FIXED + 4096
    entry = struct.pack("<H", len(record.raw_name)) + record.raw_name + bytes([record.kind])
    entry += struct.pack("<B", len(record.raw_dtype)) + record.raw_dtype.encode()
    entry += struct.pack(f"<B{len(record.shape)}I", len(record.shape), *record.shape)
    entry += struct.pack("<QQQ", start, start + size, record.length)
    fixed = b"|TZR|" + struct.pack("<IQ24xQ8xQQ", 4, 1, 0, 1, 4096)
    sealed = data[record.data_offset : record.end]
    path.write_bytes(fixed + entry.ljust(4096, b"\0") + before + digest + rest + sealed + bytes(8))


def index_of(path: Path) -> FileIndex:
    """The index of a .tensors file."""
    source = LocalSource(path)
    try:
        return read_index(source)
    finally:
        source.close()


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """manifest.json says what is in the bundle now, and has every change that is wished."""
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    for entry in document["files"]:
        data = (bundle / entry["name"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name, entry in document["tensors_files"].items():
        data, index = (bundle / name).read_bytes(), index_of(bundle / name)
        headers = (data[r.header_offset : r.data_offset] for r in index.tensors)
        entry |= {
            "size": index.size,
            "tensors": len(index.tensors),
            "data_bytes": index.data_bytes,
            "index_sha256": index.digest,
            "headers_sha256": hashlib.sha256(b"".join(headers)).hexdigest(),
        }
    change(document)
    path.write_text(json.dumps(document, indent=2))


def downgrade(document: dict[str, Any]) -> None:
    """To version 1, which has no MAC."""
    document["version"] = 1
    del document["authentication"]
    for entry in document["tensors_files"].values():
        entry.pop("digests", None)


def exchange(one: Path, other: Path) -> None:
    """Two files change places."""
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
