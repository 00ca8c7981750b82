"""One load, and how long its threads had the interpreter's lock: a job on the command line, a line
of JSON on stdout. Runs with lock_meter.c preloaded, and with the packages of any checkout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("lock_meter.c")
# Where the worker finds the meter, which is preloaded.
METER = "LOCK_METER"


class _Account(ctypes.Structure):
    """account of lock_meter.c."""

    _fields_ = (
        ("running", ctypes.c_int64),
        ("held", ctypes.c_int64),
        ("taken", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Held:
    """Of all threads together since `LockMeter` began."""

    running: float
    """CPU seconds of threads that had the lock."""
    held: float
    """Seconds that some thread had it, also one that waited for a processor."""
    taken: int
    """How often it was taken and dropped."""

    def __sub__(self, other: Held) -> Held:
        return Held(self.running - other.running, self.held - other.held, self.taken - other.taken)


class LockMeter:
    """lock_meter.c in this process, which has a single thread yet."""

    def __init__(self) -> None:
        if sys.version_info[:2] != (3, 11) or METER not in os.environ:
            sys.exit(f"The lock is measured in CPython 3.11, with {METER} and LD_PRELOAD set.")
        self._meter = ctypes.PyDLL(os.environ[METER])
        python = ctypes.pythonapi
        functions = (python.PyEval_SaveThread, python.PyEval_RestoreThread)
        if self._meter.meter_start(*(ctypes.cast(f, ctypes.c_void_p) for f in functions)):
            sys.exit("This Python keeps its lock elsewhere than CPython 3.11.")

    def read(self) -> Held:
        """Until now."""
        found = _Account()
        self._meter.meter_read(ctypes.byref(found))
        return Held(found.running / 1e9, found.held / 1e9, found.taken)


def compiled(directory: Path) -> dict[str, str]:
    """Compile the meter into `directory`; the environment of a process that is measured."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    library = directory / "lock_meter.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return {METER: str(library), "LD_PRELOAD": str(library)}


def _without_c(*, every: bool) -> None:
    """urllib3 receives, and with `every` Python assembles as well."""
    from tensorserve.loading import chunk_decryption, receiver
    from tensorserve.sources import http

    http.curl = lambda: None
    if every:
        for module in (chunk_decryption, receiver):
            module.functions = lambda: None  # type: ignore[attr-defined]


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _load(job: Any, opened: Any, progress: Any) -> tuple[int, object]:
    """(bytes, what has to live until it was measured) of a load into tensors."""
    from bench.contestants import ours

    with ours._stream(job, opened, progress) as stream:
        tensors = {record.name: tensor for record, tensor in stream}
    return sum(tensor.nbytes for tensor in tensors.values()), tensors


def _prefetch(job: Any, opened: Any, progress: Any) -> tuple[int, object]:
    """The same of fetching the file ahead, as it is, into shared memory that holds all of it."""
    from tensorserve.loading.block_cache import BLOCK_BYTES, PRESENT, BlockCache
    from tensorserve.loading.prefetch import Prefetcher

    source, connections = opened.source, job.options.get("connections")
    cache = BlockCache.create(source.size, source.version, 1)
    budget = source.size + BLOCK_BYTES
    fetcher = Prefetcher(source, cache.reopen(), budget, progress, connections)
    thread = threading.Thread(target=fetcher.run)
    thread.start()
    while any(cache.state(block) != PRESENT for block in range(cache.blocks)):
        time.sleep(0.01)
    cache.stop()
    thread.join()
    return source.size, cache


def main(asked: dict[str, Any]) -> None:
    """Load once, and print what it took."""
    # Of the checkout that is measured; torch, too, before the clock starts.
    import tensorserve.loading.stream  # noqa: F401
    from bench.contestants import Job, ours
    from tensorserve.loading import LoadProgress

    if asked["way"] in {"urllib3", "python"}:
        _without_c(every=asked["way"] == "python")
    job = Job("ours", asked["uri"], asked["kind"], asked["key"], asked["options"])
    ours.prepare(job)
    # What is made once for a process is not the load's.
    ours._open(job, None).source.close()
    gc.collect()
    meter, progress = LockMeter(), LoadProgress()
    opened = ours._open(job, progress)
    load = _prefetch if asked["way"] == "prefetch" else _load
    # Not `Usage`: its samples take the lock.
    Path("/proc/self/clear_refs").write_text("5")
    resident, cpu, began = _status_bytes("VmRSS"), time.process_time(), time.perf_counter()
    before = meter.read()
    loaded = load(job, opened, progress)
    held = meter.read() - before
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    opened.source.close()
    print(
        json.dumps(
            {
                "bytes": loaded[0],
                "lock": held.running,
                "lock_held": held.held,
                "lock_taken": held.taken,
                "cpu_seconds": cpu,
                "seconds": seconds,
                "peak_bytes": _status_bytes("VmHWM") - resident,
                "requests": progress.snapshot().requests,
            }
        ),
        flush=True,
    )
    os._exit(0)  # the tensors' memory is given back faster so


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
