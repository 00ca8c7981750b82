"""From tmpfs to a GPU: this loader beside tensorizer and beside bare copies from pinned memory.

    python -m bench.gpu

Needs torch with CUDA, tensorizer and this package; neither vLLM nor git. Loads are checked on the
device. Ends by itself within `--minutes`. `bench/gpu-kit` brings it to a machine without network.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import results, table
from bench.device import device_facts
from bench.model import Model, ensure_model, parse_size
from bench.one_run import run_alone
from bench.place import Place
from bench.running import START_SECONDS, Contestant, Line, MismatchError, load, shown_option

# Two files and what is in memory while these are made; tmpfs is memory too.
_COPIES = 4.0
_RING = 128 * 1024**2  # the engine's, where host memory allows
_READERS = (8, 4, 16, 2, 1)
# The share of the time for trials of settings.
_TRIALS = 0.4
# A trial that takes this many times longer than the best so far is stopped.
_HOPELESS = 1.5
# For the table, and for the end of the last load.
_SPARE_SECONDS = 10.0
_SEALED, _OPEN = "tensorizer-encrypted", "tensorizer-plain"


def main() -> int:
    """Measures, prints the table, writes the result; returns 69 without a GPU."""
    parser = options_parser(__doc__)
    parser.add_argument("--repetitions", default=5, type=int, help="at most (5)")
    parser.add_argument("--contestants", type=lambda text: text.split(","), help="only these")
    options = parser.parse_args()
    return run_on_device(options, lambda model, place, until: run(options, model, place, until))


def options_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all GPU benches."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--size", default="4GB", type=parse_size, help="of the model (4GB)")
    parser.add_argument("--minutes", default=8.0, type=float, help="the whole run, at most (8)")
    parser.add_argument("--directory", type=Path, help="a tmpfs (/dev/shm, if it has room)")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    parser.add_argument("--keep", action="store_true", help="leave the model where it was made")
    parser.add_argument("--output", type=Path, help="the JSON file")
    return parser


def run_on_device(options: argparse.Namespace, run: Callable[[Model, Place, float], int]) -> int:
    """The exit code of `run(model, place, end time)`; 69 without a GPU, 75 without enough space."""
    until = time.monotonic() + 60 * options.minutes - _SPARE_SECONDS
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            print(
                f"torch {torch.__version__} sees no GPU here (torch.cuda.is_available() is False): "
                "this bench needs one, and torch built for CUDA.",
                file=sys.stderr,
            )
            return 69
    directory = _directory(options)
    if directory is None:
        print(
            f"No directory has room for a model of {options.size / 1e9:.1f} GB, which takes "
            f"{_COPIES * options.size / 1e9:.1f} GB while it is made: name one (--directory), or "
            "take a smaller one (--size).",
            file=sys.stderr,
        )
        return 75

    def measured() -> int:
        with _model(options, directory) as (model, place):
            return run(model, place, until)

    return run_alone(measured)


def run(options: argparse.Namespace, model: Model, place: Place, until: float) -> int:
    """Runs all contestants in turns; 1 if one failed. The result is written after each round."""
    content = describe(options, model, place)
    path = result_path("gpu", options)
    lines, failed = [], []
    end_of_trials = time.monotonic() + _TRIALS * (until - time.monotonic())
    for contestant in _contestants(options.device):
        if options.contestants and contestant.name not in options.contestants:
            continue
        try:
            lines.append(
                Line(place.name, contestant, _best(place, model, contestant, end_of_trials))
            )
        except (MismatchError, RuntimeError) as error:
            failed.append(_failure(contestant, error))
    longest = 0.0
    for repetition in range(options.repetitions):
        if repetition and time.monotonic() + 1.2 * longest > until:
            print(f"  no time for repetition {repetition + 1}", flush=True)
            break
        began = time.monotonic()
        # Another order in each round, so that no contestant always follows the same one.
        turn = repetition % len(lines) if lines else 0
        for line in [*lines[turn:], *lines[:turn]]:
            try:
                sample, _ = load(place, model, line.contestant, line.option, _left(until))
                if sample is None:
                    raise RuntimeError("there was no time for it (--minutes)")
            except (MismatchError, RuntimeError) as error:
                failed.append(_failure(line.contestant, error))
                lines.remove(line)
                continue
            line.samples.append(sample)
            print(
                f"  {repetition + 1}/{options.repetitions} {sample['seconds']:8.3f} s  "
                f"{line.contestant.label}{shown_option(line.option)}",
                flush=True,
            )
        longest = max(longest, time.monotonic() - began)
        content |= {"lines": [results.as_data(line) for line in lines], "failed": failed}
        results.write("gpu", content, path)
    table.show(path)
    for failure in failed:
        print(f"FAILED: {failure['label']}: {failure['error']}", file=sys.stderr)
    return 1 if failed else 0


def describe(options: argparse.Namespace, model: Model, place: Place) -> dict[str, Any]:
    """The parts of a result that all GPU benches have, besides the figures."""
    return {
        "machine": results.machine() | {"gpu": device_facts(options.device)},
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "tensors": model.tensors, "digest": model.digest},
        "cases": [{"name": place.name, "title": place.title} | place.facts],
    }


def result_path(kind: str, options: argparse.Namespace) -> Path:
    """The path of the result, chosen at the start and written again after each round."""
    return options.output or results.fresh_path(kind)


def _best(place: Place, model: Model, contestant: Contestant, until: float) -> dict[str, Any]:
    """The value of the swept option that was fastest in one load each; trials end at `until`."""
    if contestant.sweep is None:
        return {}
    name, values = contestant.sweep
    best, best_seconds = values[0], float("inf")
    for value in values:
        if _left(until) < 0:
            break
        limit = min(_left(until), _HOPELESS * best_seconds)
        sample, _ = load(place, model, contestant, {name: value}, limit)
        if sample is not None:
            print(f"  trying {sample['seconds']:8.3f} s  {contestant.label}, {value} {name}")
            if sample["seconds"] < best_seconds:
                best, best_seconds = value, sample["seconds"]
    return {name: best}


def _left(until: float) -> float:
    """Seconds for one load, beside those that a process takes to begin; negative: none."""
    return until - time.monotonic() - START_SECONDS


def _failure(contestant: Contestant, error: Exception) -> dict[str, str]:
    print(f"  failed  {contestant.label}: {error}", flush=True)
    return {"name": contestant.name, "label": contestant.label, "error": str(error)[-2000:]}


def _contestants(device: str) -> list[Contestant]:
    options: dict[str, Any] = {"device": device, "check_on_device": True}
    made = []
    for kind, base in (("encrypted", _SEALED), ("plain", _OPEN)):
        made += [
            Contestant(
                f"ours-{kind}",
                f"this loader, {kind}",
                "ours",
                kind,
                options=options | {"ring": _RING},
                base=base,
            ),
            Contestant(
                base,
                f"tensorizer, {kind}, default",
                "tensorizer_reader",
                kind,
                options=options,
                base=base,
            ),
            Contestant(
                f"reference-{kind}",
                f"TENSORSERVE_LOADER=reference, {kind}",
                "ours",
                kind,
                options=options | {"loader": "reference"},
                base=base,
            ),
            Contestant(
                f"{base}-best",
                f"tensorizer, {kind}, best",
                "tensorizer_reader",
                kind,
                options=options,
                sweep=("readers", _READERS),
                base=base,
            ),
        ]
    made.append(
        Contestant(
            "pinned",
            "copies from pinned memory, nothing else",
            "pinned_copy",
            "plain",
            options=options,
            base=_OPEN,
            moves_only=True,
        )
    )
    return made


# Where the model lies -----------------------------------------------------------------------------


def _directory(options: argparse.Namespace) -> Path | None:
    """The first directory with enough space, preferably one that has the model already."""
    named = [options.directory] if options.directory else [Path("/dev/shm"), Path("/tmp")]
    for directory in named:
        below = directory / "tensorserve-bench"
        if directory.is_dir() and (
            below.exists() or shutil.disk_usage(directory).free > _COPIES * options.size
        ):
            return below
    return None


@contextmanager
def _model(options: argparse.Namespace, directory: Path) -> Iterator[tuple[Model, Place]]:
    """It goes away at the end, for its memory is the machine's."""
    try:
        model = ensure_model(options.size, directory, bare=True, device=options.device)
        kind = _file_system(directory)
        name = device_facts(options.device)["name"]
        files = {k: str(file) for k, file in model.files.items() if file.exists()}
        yield model, Place("gpu", f"{kind} to {name}", files, facts={"file_system": kind})
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)


def _file_system(path: Path) -> str:
    """The type of the file system, as mount(8) names it. Unless it is tmpfs, the page cache is
    measured."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, at, found, *_ = line.split()
        if path.is_relative_to(at) and len(at) >= len(best):
            best, kind = at, found
    return kind


if __name__ == "__main__":
    sys.exit(main())
