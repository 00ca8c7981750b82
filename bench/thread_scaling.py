"""Does a load get slower with more threads? Receiving and opening are sleeps without the lock.

    python -m bench.thread_scaling [--base ANOTHER_CHECKOUT]

The file is in memory; a thread receives 1 GB/s and opens 3 GB/s (simulated.c), so that what is left
of a load is the work that we do for it: planning, requests without a network, counting, the queue
to the consumer. No byte of a tensor is touched. With `--base`, another checkout's in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import results, scaling_worker
from bench.arguments import model_arguments
from bench.directories import ROOT
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.place import clean_environment
from bench.table import shown, text

_SOURCE = Path(__file__).with_name("simulated.c")
# Nanoseconds a byte.
RECEIVING = 1.0
OPENING = 1 / 3
LOADS = 5


def main() -> int:
    """Measure, print the table, write the result."""
    parser = model_arguments(__doc__, repetitions=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--base", type=Path, help="the root of another checkout")
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """All numbers of threads and checkouts."""
    model = ensure_model(options.size)
    checkouts = {"this loader": ROOT}
    if options.base is not None:
        base = options.base.resolve()
        checkouts = {f"commit {results.commit(base)}": base} | checkouts
    started = results.machine()
    samples: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        library = _compiled(Path(directory))
        for _ in range(options.repetitions):
            for count in options.threads:
                for label, checkout in checkouts.items():
                    found = _measured(model, library, count, checkout)
                    samples.setdefault((count, label), []).append(found)
    head = ("GB/s", "", "threads", "CPU s/GB")
    rows = [head, *(_row(*key, samples[key]) for key in samples)]
    table = {"title": "From memory, received and opened by sleeps", "rows": rows}
    print(f"\n{table['title']}\n{text(rows)}")
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "tables": [table],
        "samples": [
            {"threads": count, "label": label, "samples": found}
            for (count, label), found in samples.items()
        ],
    }
    print(f"\nWritten to {results.write('threads', content, options.output)}")
    return 0


def _measured(model: Model, library: Path, threads: int, checkout: Path) -> dict[str, float]:
    asked = {
        "library": str(library),
        "file": str(model.files["encrypted"]),
        "key": str(model.key_file),
        "threads": threads,
        "receiving": RECEIVING,
        "opening": OPENING,
        "loads": LOADS,
    }
    done = subprocess.run(
        [sys.executable, "-P", scaling_worker.__file__, json.dumps(asked)],
        cwd=checkout,
        env=clean_environment() | {"PYTHONPATH": f"{checkout / 'entrypoint'}:{checkout}"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(threads: int, label: str, samples: list[dict[str, Any]]) -> tuple[str, ...]:
    size = samples[0]["bytes"] / 1e9
    return (
        shown(results.spread([size / s["seconds"] for s in samples])),
        label,
        str(threads),
        shown(results.spread([s["cpu_seconds"] / size for s in samples])),
    )


def _compiled(directory: Path) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc")) or "gcc"
    library = directory / "simulated.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    sys.exit(main())
