"""How fast a model is packed, beside tensorizer's own writer and a plain copy of the same bytes.

    python -m bench.pack

The writer that vLLM's own path uses is tensorizer's. All read the same safetensors file from the
page cache; on disk all end with fsync, in S3 when the server has everything. What was written is
read back once by this loader and compared with the source.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import results, table
from bench.arguments import model_arguments
from bench.contestants import Job
from bench.directories import CACHE, ROOT
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.page_cache import warm
from bench.place import clean_environment
from bench.places import BUCKET, s3_client
from bench.running import MismatchError, Sample, end_session, measure
from bench.writers import WriteJob

from s3server import S3Server  # isort: skip

PLACES = ("disk", "s3")
KINDS = ("encrypted", "plain")
LABELS = {
    "pack": "tensorserve pack",
    "tensorizer": "tensorizer's writer",
    "copy": "plain copy of the bytes",
}
HEAD = ("ratio", "", "GB/s", "seconds", "CPU s/GB", "peak memory", "without file pages")
BASE = "tensorizer"
_LONGEST_SECONDS = 1800.0


@dataclass(frozen=True)
class Target:
    """The destination of the writes."""

    name: str
    title: str
    root: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def clear(self, name: str) -> str:
        """The destination called `name`, with nothing in it."""
        if self.name == "disk":
            shutil.rmtree(Path(self.root) / name, ignore_errors=True)
        else:
            client = s3_client(self.environment)
            found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"packed/{name}/")
            for entry in found.get("Contents", ()):
                client.delete_object(Bucket=BUCKET, Key=entry["Key"])
        return f"{self.root}/{name}"


def main() -> int:
    """Measure, print the tables, write the result."""
    parser = model_arguments(__doc__, repetitions=5)
    parser.add_argument("--cases", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument(
        "--directory", type=Path, default=CACHE / "packed", help="on the disk to write to"
    )
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """All cases; in each, all writers in turns."""
    model = ensure_model(options.size)
    started = results.machine()
    tables, samples = [], {}
    for place in options.cases:
        with open_target(place, options.directory, model) as target:
            for kind in KINDS:
                print(f"\n{target.title}, {kind}", flush=True)
                found = run_kind(target, kind, model, options.repetitions)
                samples[f"{place}-{kind}"] = found
                tables.append({"title": f"{target.title}, {kind}", "rows": rows(found, model)})
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "tensors": model.tensors, "digest": model.digest},
        "samples": samples,
        "tables": tables,
    }
    table.show(results.write("pack", content, options.output))
    return 0


@contextmanager
def open_target(name: str, directory: Path, model: Model) -> Iterator[Target]:
    """A destination to write to. At the end, written files are removed and servers stopped."""
    if name == "disk":
        directory.mkdir(parents=True, exist_ok=True)
        try:
            yield Target(name, "to a directory, until it is on the disk", str(directory))
        finally:
            shutil.rmtree(directory)
        return
    with S3Server(CACHE / "s3-pack") as server:
        server.make_bucket(BUCKET)
        title = "to S3 on loopback (SeaweedFS)"
        target = Target(name, title, f"s3://{BUCKET}/packed", server.environment)
        # The server creates its volumes at the first write, which is not measured.
        write(WriteJob("copy", str(model.hugging_face), target.clear("first")), server.environment)
        target.clear("first")
        yield target
    shutil.rmtree(CACHE / "s3-pack")


def run_kind(target: Target, kind: str, model: Model, repetitions: int) -> dict[str, list[Sample]]:
    """{writer: its samples}. Raises MismatchError if other tensors were written."""
    found: dict[str, list[Sample]] = {writer: [] for writer in LABELS}
    order = list(LABELS)
    for repetition in range(repetitions):
        turn = repetition % len(order)
        for writer in [*order[turn:], *order[:turn]]:
            destination = target.clear(writer)
            key_file = str(model.key_file) if kind == "encrypted" else None
            job = WriteJob(writer, str(model.hugging_face), destination, key_file)
            warm(job.weights)
            sample = write(job, target.environment)
            found[writer].append(sample)
            print(
                f"  {repetition + 1}/{repetitions}  {sample['seconds']:7.2f} s  {LABELS[writer]}",
                flush=True,
            )
            if repetition == 0 and writer != "copy":
                check(job, kind, target, model)
            target.clear(writer)
    return found


def write(job: WriteJob, environment: Mapping[str, str]) -> Sample:
    """One write in a new process. Raises RuntimeError with its output if it failed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.writers"],
        cwd=ROOT,
        env=clean_environment() | dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(job.to_json(), timeout=_LONGEST_SECONDS)
    finally:
        end_session(process)
    if process.returncode or not output.strip():
        raise RuntimeError(f"{job.writer} to {job.destination} failed:\n{errors[-4000:]}")
    return dict(json.loads(output.strip().splitlines()[-1]))


def check(job: WriteJob, kind: str, target: Target, model: Model) -> None:
    """Checks that this loader reads the model from the written file."""
    read = Job("ours", f"{job.destination}/model.tensors", kind, job.key_file)
    sample = measure(read, dict(target.environment))
    assert sample is not None
    if sample["digest"] != model.digest:
        raise MismatchError(f"{LABELS[job.writer]} wrote other tensors ({target.name}, {kind})")


def rows(samples: Mapping[str, list[Sample]], model: Model) -> list[tuple[str, ...]]:
    """The table; the first row is its head."""
    found: list[tuple[str, ...]] = [HEAD]
    for writer, mine in samples.items():
        pairs = zip(samples[BASE], mine, strict=True)
        ratio = results.spread([theirs["seconds"] / ours["seconds"] for theirs, ours in pairs])
        seconds = results.spread([sample["seconds"] for sample in mine])

        def middle(name: str, of: list[Sample] = mine) -> Any:
            return results.spread([sample[name] for sample in of])[0]

        found.append(
            (
                "base" if writer == BASE else table.shown(ratio, "×"),
                LABELS[writer],
                f"{model.bytes / seconds[0] / 1e9:.3g}",
                table.shown(seconds),
                f"{middle('cpu_seconds') / (model.bytes / 1e9):.2f}",
                f"{middle('peak_bytes') / 1e6:.0f} MB",
                f"{middle('own_peak_bytes') / 1e6:.0f} MB",
            )
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
