"""From tmpfs to a GPU: this loader beside tensorizer and beside bare copies from pinned memory.

    python -m bench.gpu

Needs torch with CUDA, tensorizer and this package, but not vLLM. Loads are checked on the device.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench import results, table
from bench.model import Model, ensure_model, parse_size
from bench.one_run import run_alone
from bench.places import Place
from bench.running import Contestant, Line, run_place

# Three files, and the tensors in memory while these are made; tmpfs is memory too.
_COPIES = 4.5
_READERS = ("readers", (8, 4, 16, 2, 1))
_SEALED, _OPEN = "tensorizer-encrypted", "tensorizer-plain"


def main() -> int:
    """Measure, print the table, write the result; 69 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="16GB", type=parse_size, help="of the model (16GB)")
    parser.add_argument("--repetitions", default=3, type=int)
    parser.add_argument("--directory", default=Path("/dev/shm"), type=Path, help="a tmpfs")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    parser.add_argument("--keep", action="store_true", help="leave the model in the tmpfs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            print(
                f"torch {torch.__version__} sees no GPU here (torch.cuda.is_available() is False): "
                "this bench needs one, and torch built for CUDA.",
                file=sys.stderr,
            )
            return 69
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """One case; the model goes away at the end, for its memory is the machine's."""
    directory = options.directory / "tensorserve-bench"
    free = shutil.disk_usage(options.directory).free
    if free < _COPIES * options.size and not directory.exists():
        print(
            f"{options.directory} has {free / 1e9:.1f} GB free; three files of "
            f"{options.size / 1e9:.1f} GB and the memory to make them are needed.",
            file=sys.stderr,
        )
        return 75
    started = results.machine() | {"gpu": _gpu(options.device)}
    try:
        model = ensure_model(options.size, directory, bare=True)
        place = Place(
            "gpu", f"tmpfs to {_gpu(options.device)}", {k: str(f) for k, f in model.files.items()}
        )
        found = run_place(
            place,
            model,
            _contestants(options.device),
            options.repetitions,
            lambda text: print(text, flush=True),
        )
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
    path = results.write("gpu", _content(options, started, place, model, found), options.output)
    table.show(path)
    return 0


def _content(
    options: argparse.Namespace,
    machine: dict[str, object],
    place: Place,
    model: Model,
    found: list[Line],
) -> dict[str, object]:
    return {
        "machine": machine,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "tensors": model.tensors, "digest": model.digest},
        "cases": [{"name": place.name, "title": place.title}],
        "lines": [results.as_data(line) for line in found],
    }


def _contestants(device: str) -> list[Contestant]:
    options = {"device": device, "check_on_device": True}
    made = []
    for kind, base in (("encrypted", _SEALED), ("plain", _OPEN)):
        made += [
            Contestant(
                f"ours-{kind}", f"this loader, {kind}", "ours", kind, options=options, base=base
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
                f"{base}-best",
                f"tensorizer, {kind}, best",
                "tensorizer_reader",
                kind,
                options=options,
                sweep=_READERS,
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


def _gpu(device: str) -> str:
    if device == "cpu":
        return "the CPU (only to try this script)"
    import torch

    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.exit(main())
