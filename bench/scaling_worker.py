"""Loads from memory, received and opened by sleeps (simulated.c): a job on the command line, a line
of JSON on stdout. Runs with the packages of any checkout.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

_STEP = 1024**2


def main(asked: dict[str, Any]) -> None:
    """`loads` times the whole file with so many threads; prints bytes and seconds."""
    from bench.contestants import Job, ours
    from tensorserve.loading import LoadOptions, LoadProgress
    from tensorserve.loading.stream import TensorStream

    library = ctypes.CDLL(asked["library"])
    opened = ours._open(Job("ours", asked["file"], "encrypted", asked["key"]), None)
    _simulate_cipher(library, asked["opening"])
    source = _memory_source(library, Path(asked["file"]), asked["receiving"])
    total = sum(record.length for record in opened.index.tensors)
    began = time.perf_counter()
    cpu = time.process_time()
    for _ in range(asked["loads"]):
        with TensorStream(
            source,
            opened.index.tensors,
            encrypted=True,
            key=opened.key,
            options=LoadOptions(connections=asked["threads"], ahead_bytes=16 * 1024**3),
            progress=LoadProgress(),
        ) as stream:
            for _tensor in stream:
                pass
    seconds = time.perf_counter() - began
    size = total * asked["loads"]
    found = {"bytes": size, "seconds": seconds, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps(found), flush=True)
    os._exit(0)


def _simulate_cipher(library: ctypes.CDLL, opening: float) -> None:
    """`opening`: nanoseconds a byte. No page of a tensor is touched either."""
    from tensorserve.loading import span_table

    library.set_opening(ctypes.c_double(opening))
    found = span_table.functions()
    assert found is not None
    names = ("open", "begin", "strip", "check")
    addresses = [getattr(library, f"simulated_{name}") for name in names]
    values = [ctypes.cast(each, ctypes.c_void_p).value for each in addresses]
    for field, value in zip(("open", "begin", "open_strip", "check"), values, strict=True):
        setattr(found.cipher, field, value)
    found.cipher.populates = 0


def _memory_source(library: ctypes.CDLL, file: Path, receiving: float) -> Any:
    """`receiving`: nanoseconds a byte of one connection."""
    from tensorserve.sources import Filling, Source

    library.simulated_range.restype = None
    with file.open("rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE)
    kept = (ctypes.c_ubyte * len(content)).from_buffer(content)
    address = ctypes.addressof(kept)

    class Memory(Source):
        """The file's bytes."""

        name, size, version, pinned, remote = str(file), len(content), "1", True, True
        long_requests = True

        def read_parts(self, offset: int, parts: Filling) -> None:
            """As a source of HTTP: one call of C."""
            sink = parts.sink
            if sink is None:
                parts.take(content[offset : offset + parts.length])
                return
            library.simulated_range(
                ctypes.c_void_p(sink.take),
                ctypes.c_void_p(sink.state),
                ctypes.c_void_p(sink.finished),
                ctypes.c_void_p(address + offset),
                ctypes.c_int64(parts.length),
                ctypes.c_int64(_STEP),
                ctypes.c_double(receiving),
            )
            parts.check()

        def close(self) -> None:
            """Nothing is open."""

    return Memory()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
