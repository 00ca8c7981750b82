"""One measured load in a process of its own: a job on stdin, one line of JSON on stdout."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from typing import Any

from bench.contestants import Job, synchronize
from bench.usage import Usage


def measure(job: Job) -> dict[str, Any]:
    """Load once. Imports are not timed; opening the source and reading the index are."""
    contestant = importlib.import_module(f"bench.contestants.{job.contestant}")
    import torch  # every contestant returns torch tensors

    contestant.prepare(job)
    device = job.options.get("device", "cpu")
    if device != "cpu":
        torch.zeros(1, device=device)  # creates the CUDA context, which is not measured
    synchronize(device)
    gc.collect()
    with Usage() as usage:
        loaded = contestant.load(job)
    found: dict[str, Any] = {
        "seconds": usage.seconds,
        "cpu_seconds": usage.cpu_seconds,
        "peak_bytes": usage.peak_bytes,
        "parts": loaded.parts,
        "digest": None,
        "bytes": None,
    }
    if loaded.tensors is not None:
        from bench.digest import checksum, data_bytes, digest

        check = checksum if job.options.get("check_on_device") else digest
        found["digest"] = check(loaded.tensors)
        found["bytes"] = data_bytes(loaded.tensors)
    loaded.close()
    return found


def main() -> None:
    """Measure the job on stdin."""
    # Output of libraries goes to stderr: stdout has the result.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = measure(Job(**json.load(sys.stdin)))
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    # Threads and children of a contestant must not delay the next one.
    os._exit(0)


if __name__ == "__main__":
    main()
