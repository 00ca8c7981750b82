"""What does verification cost: loads that compare digests, beside one that compares only tags?

    python -m bench.verification

One encrypted file of tensorizer's own writer, which has each tensor's SHA-256 in clear, loaded in
three ways: with a manifest that `tensorserve sign` made; without one, where TENSORSERVE_VERIFY=auto
hashes every tensor; and without one under TENSORSERVE_VERIFY=tags, which compares the chunks' tags
alone, as every load does. From the page cache, and over HTTP on a link of `--rate`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import results, table, writers
from bench.arguments import model_arguments
from bench.contestants import Job
from bench.directories import CACHE
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.running import MismatchError, Sample, measure
from bench.writers import WriteJob

from rangeserver import RangeServer  # isort: skip

_RATE = 300e6  # bytes a second; well below what the server itself can do


@dataclass(frozen=True)
class Way:
    """One line of the table. `mode` is the verification mode (bundle/trust.py, MODES)."""

    mode: str
    label: str
    verify: str
    signed: bool


WAYS = (
    Way("tags", "tags alone (TENSORSERVE_VERIFY=tags)", "tags", False),
    Way("manifest", "an authenticated manifest", "auto", True),
    Way("digests", "each tensor's SHA-256 (no manifest)", "auto", False),
)


def main() -> int:
    """Measure, print the table, write the result."""
    parser = model_arguments(__doc__, repetitions=5)
    parser.add_argument("--rate", default=_RATE, type=float, help="bytes a second, all together")
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Both places, all ways interleaved."""
    model = ensure_model(options.size)
    started = results.machine()
    found: dict[str, dict[str, list[Sample]]] = {}
    tables = []
    with _bundles(model) as directory:
        for place, title in (
            ("file", "a local file, in the page cache"),
            ("http", f"HTTP, {options.rate / 1e6:g} MB/s for all connections together"),
        ):
            samples: dict[str, list[Sample]] = {way.mode: [] for way in WAYS}
            for repetition in range(options.repetitions):
                turn = repetition % len(WAYS)
                for way in [*WAYS[turn:], *WAYS[:turn]]:
                    sample = _load(model, directory, way, place, options.rate)
                    samples[way.mode].append(sample)
                    print(f"  {place} {way.mode}: {sample['seconds']:.2f} s", flush=True)
            found[place] = samples
            tables.append({"title": f"{title}, encrypted", "rows": _rows(samples)})
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "samples": found,
        "tables": tables,
    }
    path = results.write("verification", content, options.output)
    table.show(path)
    return 0


def _rows(samples: dict[str, list[Sample]]) -> list[tuple[str, ...]]:
    rows = [("time, ratio", "CPU, ratio", "what vouches", "seconds", "CPU seconds")]
    base = samples[WAYS[0].mode]
    for way in WAYS:
        mine = samples[way.mode]
        ratios = []
        for figure in ("seconds", "cpu_seconds"):
            each = [m[figure] / b[figure] for m, b in zip(mine, base, strict=True)]
            ratios.append(table.shown(results.spread(each), "×") if mine is not base else "base")
        seconds = [
            table.shown(results.spread([sample[figure] for sample in mine]))
            for figure in ("seconds", "cpu_seconds")
        ]
        rows.append((*ratios, way.label, *seconds))
    return rows


@contextmanager
def _bundles(model: Model) -> Iterator[Path]:
    """A directory with the bundles `unsigned`, as tensorizer writes it, and `signed`."""
    from tensorserve.bundle.keys import parse_key
    from tensorserve.packing.sign import sign
    from tensorserve.secret import Secret
    from tensorserve.sources import Access

    directory = CACHE / "verification"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        unsigned, signed = directory / "unsigned", directory / "signed"
        writers.tensorizer(
            WriteJob("tensorizer", str(model.hugging_face), str(unsigned), str(model.key_file))
        )
        signed.mkdir()
        os.link(unsigned / "model.tensors", signed / "model.tensors")
        for bundle in (unsigned, signed):
            (bundle / "config.json").write_text("{}")
        key = parse_key(Secret(model.key_file.read_bytes(), "the bench's file"))
        sign(str(signed), Access(), key, wish="auto")
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _load(model: Model, directory: Path, way: Way, place: str, rate: float) -> Sample:
    bundle = directory / ("signed" if way.signed else "unsigned")

    def one(uri: str) -> Sample:
        options = {"verify": way.verify, "mode": way.mode}
        sample = measure(Job("bundle", uri, "encrypted", str(model.key_file), options), {})
        assert sample is not None
        if sample["digest"] != model.digest:
            raise MismatchError(f"other tensors where {way.label} vouches")
        return sample

    if place == "file":
        return one(str(bundle))
    with RangeServer(bundle, bytes_per_second=rate) as server:
        return one(server.url)


if __name__ == "__main__":
    sys.exit(main())
