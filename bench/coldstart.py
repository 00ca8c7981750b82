"""How long does real vLLM take to be ready: with this loader, from disk, and with dummy weights?

    python -m bench.coldstart
    python -m bench.coldstart --compiled                   # with code compiled before, and without
    python -m bench.coldstart --image tensorserve:cpu      # each start in a new container of it

Ready is the first status 200 of /health, which is requested every 50 ms. vLLM's CPU build is used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench import results, table
from bench.directories import CACHE  # first: finds the demo's and the tests' modules
from bench.engine_start import BUCKET, Packed, Started, Starts, pack
from bench.model import parse_size
from bench.one_run import run_alone
from bench.page_cache import warm

from s3server import S3Server  # isort: skip

# kind: label. The first is what the others are compared with.
EAGER = {
    "safetensors": "stock vLLM, safetensors on local disk, in the page cache",
    "dummy": "stock vLLM, dummy weights (nothing is read)",
    "ours": "tensorserve up, encrypted, from S3 on loopback",
    "spawn": "the same, each process imports vLLM (TENSORSERVE_IMPORT_ONCE=off)",
    "no-prefetch": "the same as ours, nothing fetched ahead",
    "reference": "the same as ours, read by tensorizer's own reader (TENSORSERVE_LOADER=reference)",
}
COMPILED = {
    "empty": "stock vLLM, compiled, empty caches (VLLM_USE_AOT_COMPILE=0)",
    "warm": "the same, with the caches of its own earlier start",
    "sealed": "tensorserve up, encrypted, from S3 on loopback, empty caches, precompiled",
}


def main() -> int:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", default=5, type=int)
    parser.add_argument("--size", default="1.5GB", type=parse_size, help="of the random model")
    parser.add_argument(
        "--models", nargs="+", choices=("smollm2", "random"), default=["smollm2", "random"]
    )
    parser.add_argument("--compiled", action="store_true", help="vLLM compiles the models")
    parser.add_argument("--kinds", nargs="+", help="of start; all by default")
    parser.add_argument(
        "--image", help="start everything in new containers of it, not as processes"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    labels = COMPILED if options.compiled else EAGER
    base = next(iter(labels))
    options.kinds = options.kinds or list(labels)
    if unknown := set(options.kinds) - set(labels):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(labels)}")
    if base not in options.kinds:
        parser.error(f"--kinds needs {base}, with which the others are compared")
    return run_alone(lambda: run(options, labels))


def run(options: argparse.Namespace, labels: dict[str, str]) -> int:
    """All models; for each, the kinds of start, interleaved."""
    machine = results.machine()
    tables: list[dict[str, Any]] = []
    starts: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with (
        S3Server(CACHE / "s3") as server,
        tempfile.TemporaryDirectory(prefix="tensorserve-bench-") as temporary,
    ):
        server.make_bucket(BUCKET)
        for name in options.models:
            packed = pack(name, options.size, server)
            start = Starts(packed, server, Path(temporary), options.image, options.compiled)
            kinds = (_compiled if options.compiled else _eager)(start)
            kinds = {kind: kinds[kind] for kind in labels if kind in options.kinds}
            found = _compare(packed, kinds, options.repetitions)
            starts[packed.name] = {
                kind: [vars(start) for start in made] for kind, made in found.items()
            }
            tables += _tables(packed, found, labels, options.image)
    content = {
        "machine": machine,
        "arguments": results.arguments(options),
        "starts": starts,
        "tables": tables,
    }
    name = "coldstart" + ("-compiled" if options.compiled else "")
    name += "" if options.image is None else "-image"
    path = results.write(name, content, options.output)
    table.show(path)
    return 0


def _eager(start: Starts) -> dict[str, Callable[[], Started]]:
    return {
        "safetensors": start.stock,
        "dummy": lambda: start.stock("--load-format", "dummy"),
        "ours": start.ours,
        "spawn": lambda: start.ours(IMPORT_ONCE="off"),
        "no-prefetch": lambda: start.ours(PREFETCH="off"),
        "reference": lambda: start.ours(LOADER="reference"),
    }


def _compiled(start: Starts) -> dict[str, Callable[[], Started]]:
    fresh, kept = start.directory / "fresh", start.directory / "kept"

    def empty() -> Started:
        shutil.rmtree(fresh, ignore_errors=True)
        return start.stock(caches=fresh, VLLM_USE_AOT_COMPILE="0")

    def sealed() -> Started:
        shutil.rmtree(fresh, ignore_errors=True)
        return start.ours(caches=fresh, COMPILED="required")

    # Not measured: what the two other kinds find.
    start.precompile(fresh)
    start.stock(caches=kept, VLLM_USE_AOT_COMPILE="0")
    # vLLM's own caches of its CPU build with AOT on cannot be read again: off is its quicker way.
    return {
        "empty": empty,
        "warm": lambda: start.stock(caches=kept, VLLM_USE_AOT_COMPILE="0"),
        "sealed": sealed,
    }


def _compare(
    packed: Packed, kinds: dict[str, Callable[[], Started]], repetitions: int
) -> dict[str, list[Started]]:
    weights = packed.directory / "model.safetensors"
    print(f"\n{packed.name}", flush=True)
    # Not measured: the first start reads vLLM's files from disk.
    next(reversed(kinds.values()))()
    found: dict[str, list[Started]] = {kind: [] for kind in kinds}
    for repetition in range(repetitions):
        turn = repetition % len(kinds)
        order = list(kinds)[turn:] + list(kinds)[:turn]
        for kind in order:
            # The bucket's volumes are read into the page cache too.
            warm(weights)
            started = kinds[kind]()
            found[kind].append(started)
            print(f"  {repetition + 1}/{repetitions}  {started.seconds:7.2f} s  {kind}", flush=True)
    return found


def _tables(
    packed: Packed, found: dict[str, list[Started]], labels: dict[str, str], image: str | None
) -> list[dict[str, Any]]:
    size = (packed.directory / "model.safetensors").stat().st_size
    first = next(iter(found))
    base = [start.seconds for start in found[first]]
    rows = [("time, ratio to the first", "", "seconds to ready")]
    for kind in found:
        seconds = [start.seconds for start in found[kind]]
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        ratio = "base" if kind == first else table.shown(results.spread(ratios), "×")
        rows.append((ratio, labels[kind], table.shown(results.spread(seconds))))
    where = "" if image is None else ", each in a new container"
    tables = [{"title": f"{packed.name}, {size / 1e9:.2f} GB, start to ready{where}", "rows": rows}]
    for kind in found:
        phases = [("share", "phase", "seconds")]
        whole = median(start.seconds for start in found[kind])
        for phase in found[kind][0].phases:
            seconds = [start.phases.get(phase, 0.0) for start in found[kind]]
            share = f"{median(seconds) / whole:.0%}"
            phases.append((share, phase, table.shown(results.spread(seconds))))
        tables.append({"title": f"{packed.name}, phases: {labels[kind]}", "rows": phases})
    return tables


if __name__ == "__main__":
    sys.exit(main())
