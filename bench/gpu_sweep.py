"""From tmpfs to a GPU with other settings than the engine's, and what each step alone can do.

    python -m bench.gpu_sweep

Ring, threads, part size, processes, NUMA nodes; what a thread waits for the interpreter's lock.
Needs what `bench.gpu` needs. Ends by itself within `--minutes`: the likeliest settings come first.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench import results, table
from bench.device import processors_by_node
from bench.directories import ROOT
from bench.gpu import describe, options_parser, result_path, run_on_device
from bench.model import Model
from bench.place import Place, clean_environment
from bench.running import START_SECONDS, end_session

MIB = 1024**2
RING = 128 * MIB  # the engine's
PART = 2 * MIB  # the loader's
_THREADS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_RINGS = (4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, RING)
_PARTS = (1 * MIB, PART, 4 * MIB, 8 * MIB)
_KINDS = ("encrypted", "plain")
_Row = tuple[str, ...]
_HEAD = ("GB/s, encrypted", "GB/s, plain")


class OutOfTimeError(RuntimeError):
    """No time is left."""


@dataclass
class Worker:
    """A process that loads (gpu_worker.py). A context manager; raises as `answer`."""

    device: str
    options: dict[str, Any]
    until: float
    process: subprocess.Popen[str] = field(init=False)

    def __enter__(self) -> Worker:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_worker"],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.send({"device": self.device, "options": self.options})
        try:
            self.answer()  # it is ready
        except BaseException:
            end_session(self.process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end_session(self.process)

    def send(self, job: dict[str, Any]) -> None:
        """Ask for it; does not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Of the oldest job asked for. Raises OutOfTimeError; RuntimeError if the process ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, self.until - time.monotonic())):
                raise OutOfTimeError
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that loads ended (code {self.process.wait()})")
        return dict(json.loads(line))


class Sweep:
    """Measures points and keeps all samples."""

    def __init__(self, options: argparse.Namespace, model: Model, place: Place) -> None:
        self._device = options.device
        self._repetitions = options.repetitions
        self._model = model
        self._place = place
        self.until = 0.0
        """When the table that is being made has to be done; monotonic seconds."""
        self.samples: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def worker(self, options: dict[str, Any] | None = None) -> Worker:
        """A process, ready to load. Raises OutOfTimeError."""
        if time.monotonic() + START_SECONDS / 2 > self.until:
            raise OutOfTimeError
        return Worker(self._device, options or {}, self.until)

    def load(self, workers: Sequence[Worker], kind: str, **options: Any) -> dict[str, float]:
        """Medians of one setting; with several workers each loads its share at the same time."""
        job = {
            "uri": self._place.uris[kind],
            "kind": kind,
            "key_file": str(self._model.key_file) if kind == "encrypted" else None,
            "options": {"device": self._device, "ring": RING, **options},
        }
        rounds = []
        for _ in range(self._repetitions):
            found = self._together(workers, job)
            if found is None:
                return {}
            rounds.append(found)
        # With the most memory that the device's allocator will need, the first is another thing.
        counted = rounds[1:] or rounds
        self.samples.append({"kind": kind, "options": options, "rounds": rounds})
        made = {name: median(one[name] for one in counted) for name in counted[0]}
        said = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
        print(f"  {made['seconds']:8.3f} s  {kind}, {said or 'as in the engine'}", flush=True)
        return made

    def step(self, worker: Worker, name: str, **options: Any) -> float:
        """Bytes per second of a step alone; 0 if it failed."""
        job = {"step": name, "device": self._device, "threads": 1, **options}
        job["uri"] = self._place.uris["plain"]
        worker.send(job)
        found = worker.answer()
        if "error" in found:
            self.failed.append(f"{name}: {found['error']}")
            return 0.0
        self.samples.append({"step": name, "options": options} | found)
        return float(found["bytes_per_second"])

    def rate(self, found: dict[str, float]) -> str:
        """GB/s, for a table."""
        return f"{self._model.bytes / 1e9 / found['seconds']:.2f}" if found else "failed"

    @property
    def gigabytes(self) -> float:
        """10⁹ bytes of a load."""
        return self._model.bytes / 1e9

    def _together(self, workers: Sequence[Worker], job: dict[str, Any]) -> dict[str, float] | None:
        count = len(workers)
        for number, worker in enumerate(workers):
            share = {"share": (number, count)} if count > 1 else {}
            worker.send(job | {"options": job["options"] | share})
        answers = [worker.answer() for worker in workers]
        wrong = [answer["error"] for answer in answers if "error" in answer]
        if not wrong and count == 1 and answers[0]["digest"] != self._model.digest:
            wrong = ["WRONG TENSORS: other ones than were written"]
        if wrong:
            self.failed.append(f"{job['kind']} {job['options']}: {wrong[0]}")
            print(f"  failed: {self.failed[-1]}", flush=True)
            return None
        return {
            "seconds": max(a["ended"] for a in answers) - min(a["began"] for a in answers),
            "cpu_seconds": sum(a["cpu_seconds"] for a in answers),
            "ring_seconds": max(a["parts"]["ring"] for a in answers),
            **{
                name: max(a[name] for a in answers)
                for name in ("lock_median", "lock_p99", "lock_share")
                if all(name in a for a in answers)
            },
        }


def main() -> int:
    """Measures, prints the tables, writes the result; returns 69 without a GPU."""
    parser = options_parser(__doc__)
    parser.add_argument("--repetitions", default=3, type=int, help="of each setting (3)")
    parser.add_argument(
        "--tables", default=",".join(_TABLES), type=lambda text: text.split(","), help="only these"
    )
    options = parser.parse_args()
    return run_on_device(options, lambda model, place, until: run(options, model, place, until))


def run(options: argparse.Namespace, model: Model, place: Place, until: float) -> int:
    """All tables that there is time for; 1 if a load failed."""
    content = describe(options, model, place)
    path = result_path("gpu-sweep", options)
    sweep = Sweep(options, model, place)
    tables: list[dict[str, Any]] = []
    left_out = []
    for number, name in enumerate(options.tables):
        made: dict[str, Any] = {"title": "", "rows": []}
        tables.append(made)
        # The same time for each, and what one has left over goes to the others.
        now = time.monotonic()
        sweep.until = now + (until - now) / (len(options.tables) - number)
        try:
            _TABLES[name](sweep, made)
        except OutOfTimeError:
            left_out.append(name)
        except RuntimeError as error:
            sweep.failed.append(f"{name}: {error}")
        shown = [one for one in tables if len(one["rows"]) > 1]
        more = {"left_out": left_out, "failed": sweep.failed, "samples": sweep.samples}
        results.write("gpu-sweep", content | {"tables": shown} | more, path)
    table.show(path)
    for name in left_out:
        print(f"No time for all of the table {name} (--minutes)")
    for failure in sweep.failed:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if sweep.failed else 0


# The tables: each fills `made` row by row, so that what there was time for is kept ----------------


def _threads(sweep: Sweep, made: dict[str, Any]) -> None:
    """Threads, and the interpreter's lock."""
    made["title"] = "threads (ring of 128 MiB, parts of 2 MiB); what a thread waits for the lock"
    made["rows"] = [
        (
            *("threads", *_HEAD, "CPU s/GB, encrypted", "CPU s/GB, plain"),
            *("lock: median ms", "99 %, ms", "late", "ring, ms"),
        )
    ]
    cores = len(os.sched_getaffinity(0))
    with sweep.worker() as worker:
        for count in (None, *[count for count in _THREADS if count <= 4 * cores]):
            sealed, plain = (sweep.load([worker], k, connections=count) for k in _KINDS)
            made["rows"].append(
                (
                    "as in the engine" if count is None else str(count),
                    sweep.rate(sealed),
                    sweep.rate(plain),
                    *(
                        f"{one['cpu_seconds'] / sweep.gigabytes:.2f}" if one else ""
                        for one in (sealed, plain)
                    ),
                    f"{sealed['lock_median'] * 1e3:.2f}" if "lock_median" in sealed else "",
                    f"{sealed['lock_p99'] * 1e3:.1f}" if "lock_p99" in sealed else "",
                    f"{sealed['lock_share']:.0%}" if "lock_share" in sealed else "",
                    f"{sealed['ring_seconds'] * 1e3:.0f}" if sealed else "",
                )
            )


def _rings(sweep: Sweep, made: dict[str, Any]) -> None:
    """Rings and threads."""
    made["title"] = "ring and threads: GB/s, encrypted / plain"
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in (4, 8, 16, 32) if count <= 4 * cores]
    made["rows"] = [("ring", *(f"{count} threads" for count in counts))]
    with sweep.worker() as worker:
        for ring in _RINGS:
            cells = []
            for count in counts:
                pair = [sweep.load([worker], k, ring=ring, connections=count) for k in _KINDS]
                cells.append(" / ".join(sweep.rate(found) for found in pair))
            made["rows"].append((f"{ring // MIB} MiB", *cells))


def _steps(sweep: Sweep, made: dict[str, Any]) -> None:
    """Each step alone."""
    made["title"] = "each step alone"
    made["rows"] = [("GB/s", "step")]
    cores = len(os.sched_getaffinity(0))
    with sweep.worker() as worker:
        for name, label in (
            ("open", "decrypting and authenticating chunks of 2 MiB"),
            ("read", "reading the file, 2 MiB at once"),
        ):
            for count in sorted({1, 4, cores // 2, cores} - {0}):
                rate = sweep.step(worker, name, threads=count)
                made["rows"].append((f"{rate / 1e9:.2f}", f"{label}, {count} threads"))
        for piece in (MIB, 2 * MIB, 8 * MIB, 128 * MIB):
            rate = sweep.step(worker, "copy", piece=piece)
            label = f"copies from page-locked memory, {piece // MIB} MiB at once"
            made["rows"].append((f"{rate / 1e9:.2f}", label))
        rate = sweep.step(worker, "pin")
        made["rows"].append((f"{rate / 1e9:.2f}", "page-locking a ring of 128 MiB"))


def _nodes(sweep: Sweep, made: dict[str, Any]) -> None:
    """NUMA nodes."""
    made["title"] = "threads and ring on one NUMA node (the file is where it is)"
    made["rows"] = [("node", "processors", *_HEAD, "bare copies, GB/s")]
    with sweep.worker() as worker:
        for node, processors in processors_by_node().items():
            sealed, plain = (sweep.load([worker], k, processors=processors) for k in _KINDS)
            copies = sweep.step(worker, "copy", piece=128 * MIB, processors=processors)
            made["rows"].append(
                (
                    *(str(node), str(len(processors)), sweep.rate(sealed), sweep.rate(plain)),
                    f"{copies / 1e9:.2f}",
                )
            )


def _processes(sweep: Sweep, made: dict[str, Any]) -> None:
    """Processes."""
    made["title"] = "the same threads in several processes, each with a lock of its own"
    made["rows"] = [("processes × threads", *_HEAD)]
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        workers: list[Worker] = []
        for count in (1, 2, 4):
            if count > cores:
                break
            while len(workers) < count:
                workers.append(stack.enter_context(sweep.worker()))
            for worker in workers:
                if worker.process.poll() is not None:
                    raise RuntimeError("a process that loads ended")
            each = max(1, cores // count)
            pair = [sweep.load(workers, k, connections=each) for k in _KINDS]
            made["rows"].append((f"{count} × {each}", *(sweep.rate(found) for found in pair)))


def _part_sizes(sweep: Sweep, made: dict[str, Any]) -> None:
    """Part sizes, a constant of the loader; of a ring 64 slots are used at most."""
    made["title"] = "part size (the loader's constant, 2 MiB) and ring, threads as in the engine"
    rings = (32 * MIB, RING, 4 * RING)
    made["rows"] = [
        ("parts", *(f"ring of {ring // MIB} MiB: GB/s, encrypted / plain" for ring in rings))
    ]
    for part in _PARTS:
        # Chunks of 2 MiB do not fit smaller parts: that is another way to load.
        fits = part >= PART
        with sweep.worker({"part_bytes": part}) as worker:
            cells = []
            for ring in rings:
                sealed = sweep.rate(sweep.load([worker], _KINDS[0], ring=ring)) if fits else "–"
                plain = sweep.rate(sweep.load([worker], _KINDS[1], ring=ring))
                cells.append(f"{sealed} / {plain}")
            made["rows"].append((f"{part // MIB} MiB", *cells))


_TABLES: dict[str, Callable[[Sweep, dict[str, Any]], None]] = {
    "threads": _threads,
    "steps": _steps,
    "rings": _rings,
    "nodes": _nodes,
    "processes": _processes,
    "parts": _part_sizes,
}


if __name__ == "__main__":
    sys.exit(main())
