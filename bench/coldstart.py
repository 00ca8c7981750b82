"""From start to ready of real vLLM: this loader beside stock vLLM from disk and with dummy weights.

    python -m bench.coldstart
    python -m bench.coldstart --image tensorserve:cpu      # each start in a new container of it

Ready is the first 200 of /health, asked for every 50 ms in the same way. vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import results, table
from bench.container import in_container
from bench.directories import CACHE  # first: finds the demo's and the tests' modules
from bench.model import ensure_model, parse_size
from bench.one_run import run_alone
from bench.page_cache import warm

from running import BIN, CPU_ENVIRONMENT, Running, clean_environment  # isort: skip
from s3server import S3Server, free_ports  # isort: skip
from smollm2 import ensure_model as ensure_smollm2  # isort: skip

BUCKET = "models"
KINDS = ("ours", "no-prefetch", "reference", "safetensors", "dummy")
_POLL_SECONDS = 0.05
_READY_SECONDS = 600.0
# Stock vLLM's own messages, with which a phase of its start ends.
_STOCK_PHASES = {"import": "Starting to load model", "load": "Loading weights took"}
# As in demo/demo.py, the same for all. Eager: else vLLM compiles for half a minute.
_FLAGS = {"ENFORCE_EAGER": "true", "MAX_MODEL_LEN": "2048", "DTYPE": "float32"}


@dataclass(frozen=True)
class Packed:
    """A model on local disk, and encrypted in the bucket."""

    name: str
    directory: Path
    key_file: Path

    @property
    def uri(self) -> str:
        """Of the encrypted bundle."""
        return f"s3://{BUCKET}/{self.name}"


@dataclass(frozen=True)
class Started:
    """One start."""

    seconds: float
    phases: dict[str, float]


def main() -> int:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", default=5, type=int)
    parser.add_argument("--size", default="1.5GB", type=parse_size, help="of the random model")
    parser.add_argument(
        "--models", nargs="+", choices=("smollm2", "random"), default=["smollm2", "random"]
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--image", help="start everything in new containers of it, not as processes"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if "dummy" not in options.kinds:
        parser.error("--kinds needs dummy, with which the others are compared")
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
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
            packed = _pack(name, options.size, server)
            starts_of = _Starts(packed, server, Path(temporary), options.image)
            found = _compare(starts_of, options.repetitions, options.kinds)
            starts[packed.name] = {
                kind: [vars(start) for start in made] for kind, made in found.items()
            }
            tables += _tables(packed, found, options.image)
    content = {
        "machine": machine,
        "arguments": results.arguments(options),
        "starts": starts,
        "tables": tables,
    }
    name = "coldstart" if options.image is None else "coldstart-image"
    path = results.write(name, content, options.output)
    table.show(path)
    return 0


def _compare(start: _Starts, repetitions: int, chosen: list[str]) -> dict[str, list[Started]]:
    weights = start.packed.directory / "model.safetensors"
    every: dict[str, Callable[[], Started]] = {
        "ours": start.ours,
        "no-prefetch": lambda: start.ours(prefetch="off"),
        "reference": lambda: start.ours(loader="reference"),
        "safetensors": start.stock,
        "dummy": lambda: start.stock("--load-format", "dummy"),
    }
    kinds = {kind: every[kind] for kind in KINDS if kind in chosen}
    print(f"\n{start.packed.name}", flush=True)
    # Not counted: the first start reads vLLM's own files from disk.
    kinds["dummy"]()
    found: dict[str, list[Started]] = {kind: [] for kind in kinds}
    for repetition in range(repetitions):
        turn = repetition % len(kinds)
        order = list(kinds)[turn:] + list(kinds)[:turn]
        for kind in order:
            # The bucket's volumes are in the page cache too.
            warm(weights)
            started = kinds[kind]()
            found[kind].append(started)
            print(f"  {repetition + 1}/{repetitions}  {started.seconds:7.2f} s  {kind}", flush=True)
    return found


@dataclass(frozen=True)
class _Starts:
    """The kinds of start of one model."""

    packed: Packed
    server: S3Server
    directory: Path
    image: str | None

    def ours(self, prefetch: str = "auto", loader: str = "auto") -> Started:
        """`tensorserve up`: encrypted weights from S3."""
        port, metrics_port = free_ports(2)
        state = self.directory / "state"
        state.mkdir(exist_ok=True)
        settings = (
            CPU_ENVIRONMENT
            | self.server.environment
            | {f"TENSORSERVE_VLLM_{name}": value for name, value in _FLAGS.items()}
            | {
                "TENSORSERVE_MODEL_URI": self.packed.uri,
                "TENSORSERVE_KEY_FILE": str(self.packed.key_file),
                "TENSORSERVE_MODEL_NAME": "model",
                "TENSORSERVE_HOST": "127.0.0.1",
                "TENSORSERVE_PORT": str(port),
                "TENSORSERVE_METRICS_HOST": "127.0.0.1",
                "TENSORSERVE_METRICS_PORT": str(metrics_port),
                "TENSORSERVE_STATE_DIR": str(state),
                "TENSORSERVE_FAILURE_LINGER": "0",
                "TENSORSERVE_PREFETCH": prefetch,
                "TENSORSERVE_LOADER": loader,
            }
        )
        if "PYTHONPATH" in os.environ and self.image is None:
            settings["PYTHONPATH"] = os.environ["PYTHONPATH"]
        seconds = _time(self._running(["tensorserve", "up"], settings, port, state))
        report = subprocess.run(
            [str(BIN / "tensorserve"), "report", "--json"],
            env=clean_environment() | settings,
            capture_output=True,
            check=True,
        )
        phases: dict[str, float] = {}
        for phase in json.loads(report.stdout)["phases"]:
            if phase["phase"] != "ready":
                phases[phase["phase"]] = phases.get(phase["phase"], 0.0) + phase["seconds"]
        return Started(seconds, phases)

    def stock(self, *more: str) -> Started:
        """Stock `vllm serve` of the directory on local disk, with the same flags."""
        (port,) = free_ports(1)
        flags: list[str] = []
        for name, value in _FLAGS.items():
            flag = "--" + name.lower().replace("_", "-")
            flags += [flag] if value == "true" else [flag, value]
        words = ["vllm", "serve", str(self.packed.directory), "--host", "127.0.0.1"]
        words += ["--port", str(port), "--served-model-name", "model", *flags, *more]
        ends: dict[str, float] = {}
        seconds = _time(self._running(words, CPU_ENVIRONMENT, port), ends)
        phases: dict[str, float] = {}
        last = 0.0
        for phase, end in [*ends.items(), ("the rest", seconds)]:
            phases[phase] = end - last
            last = end
        return Started(seconds, phases)

    def _running(
        self, words: list[str], settings: dict[str, str], port: int, *writes: Path
    ) -> Running:
        log = self.directory / "log"
        if self.image is None:
            command = [str(BIN / words[0]), *words[1:]]
            return Running(command, clean_environment() | settings, log, port)
        visible = (self.packed.directory, self.packed.key_file, *writes)
        command, environment = in_container(self.image, words, settings, visible)
        return Running(command, environment, log, port)


def _time(engine: Running, ends: dict[str, float] | None = None) -> float:
    """Seconds until /health answers 200; the engine is stopped afterwards.

    `ends` is filled with when the phases of a stock start ended, {phase: seconds}.
    """
    started = time.monotonic()
    with engine:
        assert engine.process is not None
        while engine.get("/health")[0] != 200:
            if ends is not None:
                said = engine.text
                for phase, message in _STOCK_PHASES.items():
                    if phase not in ends and message in said:
                        ends[phase] = time.monotonic() - started
            if engine.process.poll() is not None:
                raise RuntimeError(f"it ended before it was ready:\n{engine.text[-4000:]}")
            if time.monotonic() - started > _READY_SECONDS:
                raise RuntimeError(f"not ready in time:\n{engine.text[-4000:]}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - started


def _pack(name: str, size: int, server: S3Server) -> Packed:
    """The model's directory, and the encrypted bundle in the bucket, made once."""
    if name == "smollm2":
        packed = Packed("SmolLM2-135M-Instruct", ensure_smollm2(), CACHE / "smollm2.key")
    else:
        model = ensure_model(size)
        packed = Packed(model.directory.name, model.hugging_face, model.key_file)
    done = CACHE / "s3" / "uploaded" / packed.name
    mark = str(packed.directory)
    if packed.key_file.exists():
        mark += hashlib.sha256(packed.key_file.read_bytes()).hexdigest()
        if done.exists() and done.read_text() == mark:
            return packed
    words = ["tensorserve", "pack", str(packed.directory), packed.uri, "--encrypt", "--overwrite"]
    words += ["--key-file", str(packed.key_file)]
    environment = clean_environment() | server.environment
    subprocess.run([str(BIN / words[0]), *words[1:]], env=environment, check=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(packed.key_file.read_bytes()).hexdigest()
    done.write_text(str(packed.directory) + digest)
    return packed


def _tables(
    packed: Packed, found: dict[str, list[Started]], image: str | None
) -> list[dict[str, Any]]:
    labels = {
        "dummy": "stock vLLM, dummy weights (nothing is read)",
        "safetensors": "stock vLLM, safetensors on local disk, in the page cache",
        "ours": "tensorserve up, encrypted, from S3 on loopback",
        "no-prefetch": "the same, nothing fetched ahead",
        "reference": "the same, read by tensorizer's own reader (TENSORSERVE_LOADER=reference)",
    }
    size = (packed.directory / "model.safetensors").stat().st_size
    base = [start.seconds for start in found["dummy"]]
    rows = [("time, ratio to dummy", "", "seconds to ready")]
    for kind, label in labels.items():
        if kind not in found:
            continue
        seconds = [start.seconds for start in found[kind]]
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        ratio = "base" if kind == "dummy" else table.shown(results.spread(ratios), "×")
        rows.append((ratio, label, table.shown(results.spread(seconds))))
    where = "" if image is None else ", each in a new container"
    tables = [{"title": f"{packed.name}, {size / 1e9:.2f} GB, start to ready{where}", "rows": rows}]
    for kind, label in labels.items():
        if kind not in found:
            continue
        phases = [("share", "phase", "seconds")]
        whole = median(start.seconds for start in found[kind])
        for phase in found[kind][0].phases:
            seconds = [start.phases.get(phase, 0.0) for start in found[kind]]
            share = f"{median(seconds) / whole:.0%}"
            phases.append((share, phase, table.shown(results.spread(seconds))))
        tables.append({"title": f"{packed.name}, phases: {label}", "rows": phases})
    return tables


if __name__ == "__main__":
    sys.exit(main())
