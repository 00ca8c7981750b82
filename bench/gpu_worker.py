"""Many measured loads, and their steps, in one process: a job a line on stdin, a sample on stdout.

What a process pays once (imports, the device's context, its allocator's memory) is in none of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.contestants import Job, ours, synchronize
from bench.digest import checksum
from bench.lock_probe import LockProbe

MIB = 1024**2
_STEP_BYTES = 512 * MIB
_CHUNK = 2 * MIB


def load(job: dict[str, Any]) -> dict[str, Any]:
    """One load by this loader: `options` are those of contestants/ours.py."""
    gc.collect()
    processors = job["options"].get("processors")
    everywhere = os.sched_getaffinity(0)
    if processors:
        # The ring, too, is made near them.
        os.sched_setaffinity(0, processors)
    before = os.times()
    began = time.monotonic()
    try:
        with LockProbe() as probe:
            loaded = ours.load(
                Job("ours", job["uri"], job["kind"], job.get("key_file"), job["options"])
            )
    finally:
        os.sched_setaffinity(0, everywhere)
    ended, after = time.monotonic(), os.times()
    assert loaded.tensors is not None
    digest = None if "share" in job["options"] else checksum(loaded.tensors)
    return {
        "began": began,
        "ended": ended,
        "seconds": ended - began,
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "parts": loaded.parts,
        "digest": digest,
        **probe.found,
    }


def step(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second of one step alone, with `threads` threads: open, read or copy."""
    threads = job["threads"]
    make = {"open": _opening, "read": _reading, "copy": _copying, "pin": _pinning}[job["step"]]
    works = [make(job) for _ in range(threads)]
    began = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        moved = sum(pool.map(lambda work: work(), works))
    synchronize(job["device"])
    return {"bytes_per_second": moved / (time.monotonic() - began)}


def _opening(_: dict[str, Any]) -> Callable[[], int]:
    """Decrypt and authenticate a chunk that is in the cache."""
    from tensorserve.crypto.secretbox import open_chunk, seal_chunk

    key, nonce = bytes(32), bytes(24)
    plain, sealed, out = (memoryview(bytearray(_CHUNK)) for _ in range(3))
    tag = seal_chunk(key, nonce, plain, sealed)

    def work() -> int:
        for _ in range(_STEP_BYTES // _CHUNK):
            open_chunk(key, nonce, tag, sealed, out)
        return _STEP_BYTES

    return work


def _reading(job: dict[str, Any]) -> Callable[[], int]:
    """Reads from changing offsets of the file into memory that is in the processor's cache."""
    path = Path(job["uri"])
    size = path.stat().st_size // _CHUNK * _CHUNK
    start = int.from_bytes(os.urandom(4), "little") * _CHUNK

    def work() -> int:
        buffer = bytearray(_CHUNK)
        with path.open("rb", buffering=0) as file:
            for number in range(_STEP_BYTES // _CHUNK):
                os.preadv(file.fileno(), [buffer], (start + number * _CHUNK) % size)
        return _STEP_BYTES

    return work


def _copying(job: dict[str, Any]) -> Callable[[], int]:
    """From page-locked memory to the device, `piece` bytes at once."""
    device, piece = torch.device(job["device"]), job["piece"]
    cuda = device.type == "cuda"
    processors = job.get("processors")
    everywhere = os.sched_getaffinity(0)
    if processors:
        os.sched_setaffinity(0, processors)
    source = torch.zeros(128 * MIB, dtype=torch.uint8, pin_memory=cuda)
    os.sched_setaffinity(0, everywhere)
    target = torch.empty(128 * MIB, dtype=torch.uint8, device=device)
    synchronize(job["device"])

    def work() -> int:
        moved = 0
        while moved < 8 * _STEP_BYTES:
            for at in range(0, len(source), piece):
                target[at : at + piece].copy_(source[at : at + piece], non_blocking=True)
            moved += len(source)
        synchronize(job["device"])
        return moved

    return work


def _pinning(job: dict[str, Any]) -> Callable[[], int]:
    """Page-locking of a ring of 128 MiB, which torch has not kept from before."""
    cuda = job["device"] != "cpu"

    def work() -> int:
        if cuda:
            torch._C._host_emptyCache()
        torch.empty(128 * MIB, dtype=torch.uint8, pin_memory=cuda)
        return 128 * MIB

    return work


def main() -> None:
    """Answer each job until stdin ends; an error is an answer too."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    ours.prepare(Job("ours", "", "plain", options=first["options"]))
    if first["device"] != "cpu":
        torch.zeros(1, device=first["device"])
    answer.write("{}\n")
    answer.flush()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            found = step(job) if "step" in job else load(job)
        # Any failure: the measuring process records it and continues.
        except Exception as error:  # noqa: BLE001
            found = {"error": f"{type(error).__name__}: {error}"}
        answer.write(json.dumps(found) + "\n")
        answer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
