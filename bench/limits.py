"""What limits the speed of a load: how fast is each necessary step alone?

    python -m bench.limits

From a local file: opening, copying and fresh memory, one by one, in one thread, on memory that is
in the cache. Over a link like S3's: what the servers take of the processors that we share.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench import places, results, table
from bench.arguments import model_arguments
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.place import Place
from bench.running import Contestant, Sample, load
from bench.usage import cpu_seconds_of, descendants
from tensorserve.crypto.secretbox import open_chunk, seal_chunk
from tensorserve.linux import populate

_CHUNK = 2 * 1024**2
# Long enough for the clock's resolution, short enough for some repetitions.
_STEP_BYTES = 1024**3
# As torch allocates memory. Page faults of shared memory, mmap's default, are slower.
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_Row = tuple[str, ...]


def main() -> int:
    """Measure, print the tables, write the result."""
    options = model_arguments(__doc__, repetitions=3).parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Both tables."""
    model = ensure_model(options.size)
    started = results.machine()
    tables = [_local(model, options.repetitions), _link(model, options.repetitions)]
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "tables": tables,
    }
    table.show(results.write("limits", content, options.output))
    return 0


# A local file -------------------------------------------------------------------------------------


def _local(model: Model, repetitions: int) -> dict[str, Any]:
    steps: dict[str, Callable[[], None]] = {
        "opening chunks of 2 MiB (decrypt, authenticate)": _opening(),
        "copying out of the page cache": _copying(model.files["encrypted"]),
        "fresh pages": _fresh_pages,
    }
    rows: list[_Row] = [("CPU s/GB", "step, in one thread")]
    total = 0.0
    for name, step in steps.items():
        costs = [_cost(step) for _ in range(repetitions)]
        total += median(costs)
        rows.append((table.shown(results.spread(costs)), name))
        print(f"  {median(costs):.2f} s/GB  {name}", flush=True)
    rows.append((f"{total:.2f}", "all of it"))
    with places.open_place("file-warm", model, rate=places.RATE, delay=places.DELAY) as place:
        for module, label in (("ours", "this loader"), ("tensorizer_reader", "tensorizer")):
            contestant = Contestant(module, label, module, "encrypted")
            samples = [_load(place, model, contestant) for _ in range(repetitions)]
            costs = [s["cpu_seconds"] / (model.bytes / 1e9) for s in samples]
            rows.append((table.shown(results.spread(costs)), f"{label}, a whole load"))
    return {"title": "a local file in the page cache, encrypted", "rows": rows}


def _cost(step: Callable[[], None]) -> float:
    """CPU seconds a GB of `step`, which works on _STEP_BYTES."""
    before = time.process_time()
    step()
    return (time.process_time() - before) / (_STEP_BYTES / 1e9)


def _opening() -> Callable[[], None]:
    key, nonce = bytes(32), bytes(24)
    plain, sealed, out = (memoryview(bytearray(_CHUNK)) for _ in range(3))
    tag = seal_chunk(key, nonce, plain, sealed)

    def step() -> None:
        for _ in range(_STEP_BYTES // _CHUNK):
            open_chunk(key, nonce, tag, sealed, out)

    return step


def _copying(path: Path) -> Callable[[], None]:
    buffer = bytearray(_CHUNK)

    def step() -> None:
        with path.open("rb", buffering=0) as file:
            for _ in range(_STEP_BYTES // _CHUNK):
                if file.readinto(buffer) < _CHUNK:
                    file.seek(0)

    step()  # now it is in the page cache
    return step


def _fresh_pages() -> None:
    for _ in range(_STEP_BYTES // _CHUNK // 16):
        with mmap.mmap(-1, 16 * _CHUNK, _PRIVATE) as memory, memoryview(memory) as view:
            for start in range(0, len(view), _CHUNK):
                with view[start : start + _CHUNK] as part:
                    populate(part)


# A link like S3's ---------------------------------------------------------------------------------


def _link(model: Model, repetitions: int) -> dict[str, Any]:
    lines = (
        Contestant(
            "link",
            "our client alone, 64 connections",
            "ours",
            "encrypted",
            options={"bytes_only": True, "connections": 64},
            moves_only=True,
        ),
        Contestant("ours-plain", "this loader, plain", "ours", "plain"),
        Contestant("ours-encrypted", "this loader, encrypted", "ours", "encrypted"),
        Contestant("runai", "Run:ai streamer, plain", "runai", "safetensors"),
    )
    found: dict[str, list[Sample]] = {line.label: [] for line in lines}
    with places.open_place("s3-like", model, rate=places.RATE, delay=places.DELAY) as place:
        for _ in range(repetitions):
            for line in lines:
                before = _servers_cpu()
                sample = _load(place, model, line)
                sample["servers"] = _servers_cpu() - before
                found[line.label].append(sample)
                print(f"  {sample['seconds']:7.2f} s  {line.label}", flush=True)
    cores = len(os.sched_getaffinity(0))
    rows: list[_Row] = [("GB/s", "", "its CPU s/GB", "the servers' CPU s/GB", "cores busy")]
    gb = model.bytes / 1e9
    for name, samples in found.items():
        seconds, own, servers = (
            median(s[key] for s in samples) for key in ("seconds", "cpu_seconds", "servers")
        )
        rows.append(
            (
                f"{gb / seconds:.3f}",
                name,
                f"{own / gb:.2f}",
                f"{servers / gb:.2f}",
                f"{(own + servers) / seconds:.2f} of {cores}",
            )
        )
    return {"title": "like S3: who takes the processors", "rows": rows}


def _servers_cpu() -> float:
    return sum(cpu_seconds_of(pid) for pid in descendants(os.getpid()))


def _load(place: Place, model: Model, contestant: Contestant) -> Sample:
    sample, _ = load(place, model, contestant, {})
    assert sample is not None  # no limit was given
    return sample


if __name__ == "__main__":
    sys.exit(main())
