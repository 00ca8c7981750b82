"""Does it pay on a CPU that each rank opens a part of the file, and gives it to the others by gloo?

    python -m bench.shared_load

Two ranks, a process each, take half of the rows of each tensor, as vLLM's weight loaders do. Each
reads the file alone, or they share it (TENSORSERVE_SHARE_LOAD=on). The slow source is the tests'
server (tests/rangeserver.py) with `--rate` bytes a second for all connections together; no process
fetches for both, so that sharing halves what comes over it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import results, table
from bench.arguments import model_arguments
from bench.directories import ROOT
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.usage import Usage

from rangeserver import RangeServer  # isort: skip

RANKS = 2
_LIMIT = 512 * 1024**2  # host memory for each rank's load, as in a start of two ranks
_RATE = 300e6
_TIMEOUT = 300


def main() -> int:
    """Measure, print the table, write the result; as a rank: load once, print what it took."""
    parser = model_arguments(__doc__ or "", repetitions=3)
    parser.add_argument("--rate", default=_RATE, type=float, help="bytes a second, all together")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(_load(**options.rank)))
        return 0
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Both sources, both ways, in turns."""
    model = ensure_model(options.size)
    started = results.machine()
    samples: dict[str, list[dict[str, Any]]] = {}
    for repetition in range(options.repetitions):
        for place in ("file", "slow"):
            for shares in (False, True):
                sample = _both(model, options.rate if place == "slow" else None, shares)
                samples.setdefault(f"{place} {shares}", []).append(sample)
                print(f"  {repetition + 1}/{options.repetitions}  {place} {sample}", flush=True)
    if len({sample["digest"] for found in samples.values() for sample in found}) != 1:
        raise RuntimeError("other tensors with sharing than without")
    tables = [
        {"title": title, "rows": _rows(model, samples[f"{place} False"], samples[f"{place} True"])}
        for place, title in (
            ("file", "two ranks, a local file, in the page cache, encrypted"),
            ("slow", f"two ranks, HTTP, {options.rate / 1e6:g} MB/s for all together, encrypted"),
        )
    ]
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "samples": samples,
        "tables": tables,
    }
    path = results.write("shared-load", content, options.output)
    table.show(path)
    return 0


def _rows(
    model: Model, alone: list[dict[str, Any]], shared: list[dict[str, Any]]
) -> list[tuple[str, ...]]:
    rows = [("time, ratio", "CPU, ratio", "", "seconds", "CPU seconds", "opened", "peak of a rank")]
    for label, found in (("each opens all", alone), ("each opens a half (gloo)", shared)):
        ratios = []
        for name in ("seconds", "cpu_seconds"):
            values = [f[name] / a[name] for f, a in zip(found, alone, strict=True)]
            ratios.append("base" if found is alone else table.shown(results.spread(values), "×"))
        opened = max(sample["opened"] for sample in found) / model.bytes
        peak = max(sample["peak_bytes"] for sample in found)
        rows.append(
            (
                *ratios,
                label,
                table.shown(results.spread([sample["seconds"] for sample in found])),
                table.shown(results.spread([sample["cpu_seconds"] for sample in found])),
                f"{opened:.2f} × the file",
                f"{peak / 1e6:.0f} MB",
            )
        )
    return rows


def _both(model: Model, rate: float | None, shares: bool) -> dict[str, Any]:
    """One load by all ranks: the longest time, the CPU seconds and opened bytes of both."""
    file = model.files["encrypted"]
    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory())
        uri = str(file)
        if rate is not None:
            server = held.enter_context(RangeServer(file.parent, bytes_per_second=rate))
            uri = f"{server.url}/{file.name}"
        processes = []
        for rank in range(RANKS):
            job = {
                "rank": rank, "store": f"{folder}/store", "uri": uri,
                "key_file": str(model.key_file), "shares": shares,
            }  # fmt: skip
            command = [sys.executable, "-m", "bench.shared_load", "--rank", json.dumps(job)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT))
        found = []
        for process in processes:
            said, _ = process.communicate(timeout=_TIMEOUT)
            if process.returncode:
                raise RuntimeError(f"a rank ended with {process.returncode}")
            found.append(json.loads(said))
    return {
        "digest": found[0]["digest"],
        "seconds": max(rank["seconds"] for rank in found),
        "cpu_seconds": sum(rank["cpu_seconds"] for rank in found),
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "opened": sum(rank["opened"] for rank in found),
    }


def _load(rank: int, store: str, uri: str, key_file: str, shares: bool) -> dict[str, Any]:
    """In a rank's process."""
    import torch
    import torch.distributed as dist

    from tensorserve.bundle.keys import GivenKey
    from tensorserve.format import read_index
    from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
    from tensorserve.loading.agreement import agree, offer_of
    from tensorserve.loading.buffer_pool import BufferPool
    from tensorserve.loading.load_memory import shared_memory
    from tensorserve.loading.rank_group import RankGroup
    from tensorserve.loading.shared_stream import SharedStream
    from tensorserve.sources import Access, open_source

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    progress = LoadProgress()
    source = open_source(uri, Access(), progress)
    index = read_index(source)
    key = GivenKey(Path(key_file).read_bytes(), "bench")
    halves = {
        record.name: _half(rank, torch.ones(record.shape, dtype=torch.bfloat16)).clone()
        for record in index.tensors
    }
    memory = shared_memory(_LIMIT, RANKS)
    options = LoadOptions(ahead_bytes=memory.own if shares else _LIMIT)

    def gather(offer: Any) -> list[Any]:
        found: list[Any] = [None] * RANKS
        dist.all_gather_object(found, offer)
        return found

    def stream(records: Any, *, whole: bool) -> TensorStream:
        return TensorStream(
            source, records, encrypted=True, key=key, options=options, progress=progress,
            check_whole=whole, paced=not whole,
        )  # fmt: skip

    dist.barrier()
    group: Any = None
    with Usage() as usage:
        if shares:
            offer = offer_of(source, index, None, index.tensors, most=None)
            agreement = agree(offer, index, rank, gather)
            group = RankGroup(agreement.name, rank, RANKS, torch.device("cpu"))
            reading: Any = SharedStream(
                stream(agreement.opened(index.tensors, rank), whole=False),
                agreement.messages, group, source, options,
                window=memory.window, memory=BufferPool(memory.kept).take,
            )  # fmt: skip
        else:
            reading = stream(index.tensors, whole=True)
        with reading:
            for record, tensor in reading:
                halves[record.name].copy_(_half(rank, tensor))
        dist.barrier()  # both have all
    if group is not None:
        group.close(failed=False)
    digest = hashlib.blake2b()
    for name in sorted(halves):
        digest.update(halves[name].view(torch.uint8).numpy().data)
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, digest.hexdigest())
    return {
        "seconds": usage.seconds,
        "cpu_seconds": usage.cpu_seconds,
        "peak_bytes": usage.peak_bytes,
        "opened": progress.snapshot().decrypt,
        "digest": hashlib.sha256("".join(every).encode()).hexdigest(),
    }


def _half(rank: int, tensor: Any) -> Any:
    """The rank's rows."""
    return tensor.chunk(RANKS, 0)[rank] if tensor.shape[0] >= RANKS else tensor


if __name__ == "__main__":
    sys.exit(main())
