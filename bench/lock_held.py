"""How long does a load hold the interpreter's lock, and what processor time does it take?

    python -m bench.lock_held [--base ANOTHER_CHECKOUT] [--libraries DIRECTORY]

Of this checkout: C's data path (libcurl, span_table.c), and urllib3 in its place. With `--base`,
another checkout's in turns, whose C is compiled: its own data path, and all of it in Python. With
`--libraries`, this checkout's with that directory's libcurl.so.4, which brings its OpenSSL. Over
HTTP and HTTPS, encrypted and plain; nginx serves.

The lock's column is processor time: a thread that has the lock and waits for a processor does not
count (lock_meter.c, which takes CPython 3.11). What the source's opening takes is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import lock_worker, places, results
from bench.arguments import model_arguments
from bench.directories import ROOT
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.place import Place, clean_environment
from bench.table import shown, text

HEAD = (
    *("lock s/GB", "", "CPU s/GB", "GB/s", "lock taken /GB", "requests /GB"),
    "memory beyond the tensors",
)


@dataclass(frozen=True)
class Way:
    """A line of the table."""

    label: str
    checkout: Path
    way: str
    """As lock_worker.py calls it."""
    libraries: Path | None = None
    """Where libcurl is looked for first."""


def main() -> int:
    """Measure, print the tables, write the result."""
    parser = model_arguments(__doc__, repetitions=5)
    parser.add_argument("--connections", type=int, default=16, help="0: as many as help")
    parser.add_argument("--places", nargs="+", default=["http", "https"])
    parser.add_argument("--kinds", nargs="+", default=["encrypted", "plain"])
    parser.add_argument("--base", type=Path, help="the root of another checkout")
    parser.add_argument("--libraries", type=Path, help="a directory with another libcurl.so.4")
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """All places, kinds and ways."""
    model = ensure_model(options.size)
    ways = [Way("libcurl", ROOT, "c"), Way("urllib3", ROOT, "urllib3")]
    if options.libraries is not None:
        ways.append(Way("libcurl of --libraries", ROOT, "c", options.libraries.resolve()))
    if options.base is not None:
        base = options.base.resolve()
        commit = results.commit(base)
        ways = [
            Way(f"commit {commit}, in Python", base, "python"),
            Way(f"commit {commit}, libcurl", base, "c"),
            *ways,
        ]
    started = results.machine()
    tables: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        meter = lock_worker.compiled(Path(directory))
        for name in options.places:
            with places.open_place(name, model, rate=places.RATE, delay=places.DELAY) as place:
                for kind in options.kinds:
                    found = _measured(options, model, place, kind, ways, meter)
                    rows = [HEAD, *(_row(way.label, found[way]) for way in ways)]
                    tables.append({"title": f"{place.title}; {kind}", "rows": rows})
                    print(f"\n{tables[-1]['title']}\n{text(rows)}", flush=True)
                    samples += [
                        {"place": name, "kind": kind, "way": way.label, "samples": found[way]}
                        for way in ways
                    ]
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "tables": tables,
        "samples": samples,
    }
    print(f"\nWritten to {results.write('lock', content, options.output)}")
    return 0


def _measured(
    options: argparse.Namespace,
    model: Model,
    place: Place,
    kind: str,
    ways: list[Way],
    meter: dict[str, str],
) -> dict[Way, list[dict[str, float]]]:
    """Each way so often, in turns, each load in a process of its own."""
    found: dict[Way, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.repetitions):
        for way in ways:
            asked = {
                "uri": place.uris[kind],
                "key": str(model.key_file) if kind == "encrypted" else None,
                "kind": kind,
                "way": way.way,
                "options": {"connections": options.connections} if options.connections else {},
            }
            done = subprocess.run(
                [sys.executable, "-P", lock_worker.__file__, json.dumps(asked)],
                cwd=way.checkout,
                env=_environment(way) | dict(place.environment) | meter,
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def _environment(way: Way) -> dict[str, str]:
    found = {} if way.libraries is None else {"LD_LIBRARY_PATH": str(way.libraries)}
    packages = f"{way.checkout / 'entrypoint'}:{way.checkout}"
    return clean_environment() | found | {"PYTHONPATH": packages}


def _row(label: str, samples: list[dict[str, float]]) -> tuple[str, ...]:
    size = samples[0]["bytes"] / 1e9

    def per_gb(field: str) -> float:
        return median(s[field] for s in samples) / size

    locks = [s["lock"] / size for s in samples]
    extra = median(s["peak_bytes"] - s["bytes"] for s in samples)
    return (
        f"{median(locks):.4f} ({min(locks):.4f}–{max(locks):.4f})",
        label,
        shown(results.spread([s["cpu_seconds"] / size for s in samples])),
        shown(results.spread([size / s["seconds"] for s in samples])),
        f"{per_gb('lock_taken'):.0f}",
        f"{per_gb('requests'):.0f}",
        f"{extra / 1e6:.0f} MB",
    )


if __name__ == "__main__":
    sys.exit(main())
