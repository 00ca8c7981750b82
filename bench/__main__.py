"""How fast is one model loaded by this loader and by others, in one run? `python -m bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import places, results, table
from bench.contestant_list import CONTESTANTS
from bench.model import ensure_model, parse_size
from bench.one_run import run_alone
from bench.running import Line, run_place


def main() -> int:
    """Measure, print the table, write the result."""
    options = parse()
    return run_alone(lambda: run(options))


def parse() -> argparse.Namespace:
    """The arguments."""
    names = [contestant.name for contestant in CONTESTANTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.5GB", type=parse_size, help="of the model (1.5GB)")
    parser.add_argument("--repetitions", default=3, type=int, help="of each load (3)")
    parser.add_argument(
        "--cases", nargs="+", choices=places.NAMES, default=list(places.NAMES), help="(all)"
    )
    parser.add_argument("--contestants", nargs="+", choices=names, default=names, help="(all)")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the lines at their best")
    parser.add_argument(
        "--rate", default=places.RATE, type=int, help="of s3-like, bytes/s a connection"
    )
    parser.add_argument("--delay", default=places.DELAY, type=float, help="of s3-like, seconds")
    parser.add_argument("--output", type=Path, help="JSON file (bench/results/loads-….json)")
    options = parser.parse_args()
    if options.repetitions < 1:
        parser.error("--repetitions must be 1 or more")
    return options


def run(options: argparse.Namespace) -> int:
    """All cases, one after the other; the result is written even if a later case fails."""
    model = ensure_model(options.size)
    print(f"{model.tensors} tensors, {model.bytes / 1e9:.3f} GB, {model.digest[:16]}", flush=True)
    chosen = [c for c in CONTESTANTS if c.name in options.contestants]
    if options.no_sweep:
        chosen = [c for c in chosen if c.sweep is None]
    cases, lines = [], []
    started = results.machine()
    try:
        for name in options.cases:
            with places.open_place(name, model, rate=options.rate, delay=options.delay) as place:
                print(f"\n{place.title}", flush=True)
                found: list[Line] = run_place(place, model, chosen, options.repetitions, _say)
            cases.append({"name": name, "title": place.title, "facts": dict(place.facts)})
            lines += [results.as_data(line) for line in found]
    finally:
        if lines:
            content = {
                "machine": started,
                "arguments": results.arguments(options),
                "model": {"bytes": model.bytes, "tensors": model.tensors, "digest": model.digest},
                "cases": cases,
                "lines": lines,
            }
            path = results.write("loads", content, options.output)
            table.show(path)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
