"""How is one start of real vLLM made and timed: ours from S3, or stock vLLM's from disk?"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.container import in_container
from bench.directories import CACHE  # first: finds the demo's and the tests' modules
from bench.model import ensure_model

from running import BIN, CPU_ENVIRONMENT, Running, clean_environment  # isort: skip
from s3server import S3Server, free_ports  # isort: skip
from smollm2 import ensure_model as ensure_smollm2  # isort: skip

BUCKET = "models"
_POLL_SECONDS = 0.05
_READY_SECONDS = 600.0
# Messages of stock vLLM that mark the end of a phase of its start.
_STOCK_PHASES = {"import": "Starting to load model", "load": "Loading weights took"}
# Equal for all. SmolLM2's dtype is that of demo/demo.py, which says why; others have their own.
_FLAGS = {"MAX_MODEL_LEN": "2048"}
_SMOLLM2_FLAGS = {"DTYPE": "float32"}
_EAGER = {"ENFORCE_EAGER": "true"}


@dataclass(frozen=True)
class Packed:
    """A model on local disk, and encrypted in the bucket."""

    name: str
    directory: Path
    key_file: Path
    flags: Mapping[str, str]
    """Of vLLM, that this model needs."""

    @property
    def uri(self) -> str:
        """Of the encrypted bundle."""
        return f"s3://{BUCKET}/{self.name}"


@dataclass(frozen=True)
class Started:
    """One start."""

    seconds: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Starts:
    """The kinds of start of one model."""

    packed: Packed
    server: S3Server
    directory: Path
    image: str | None
    compiled: bool = False
    """Whether vLLM compiles the model; else it runs eagerly."""

    def ours(self, caches: Path | None = None, **settings: str) -> Started:
        """`tensorserve up`: encrypted weights from S3.

        `settings`: of TENSORSERVE_*, without the prefix. `caches`: where compiled code is kept.
        """
        port, metrics_port = free_ports(2)
        state = self.directory / "state"
        state.mkdir(exist_ok=True)
        given = self._settings(caches) | {
            "TENSORSERVE_MODEL_NAME": "model",
            "TENSORSERVE_HOST": "127.0.0.1",
            "TENSORSERVE_PORT": str(port),
            "TENSORSERVE_METRICS_HOST": "127.0.0.1",
            "TENSORSERVE_METRICS_PORT": str(metrics_port),
            "TENSORSERVE_STATE_DIR": str(state),
            "TENSORSERVE_FAILURE_LINGER": "0",
            **{f"TENSORSERVE_{name}": value for name, value in settings.items()},
        }
        seconds = _time(self._running(["tensorserve", "up"], given, port, caches, state))
        report = subprocess.run(
            [str(BIN / "tensorserve"), "report", "--json"],
            env=clean_environment() | given,
            capture_output=True,
            check=True,
        )
        phases: dict[str, float] = {}
        for phase in json.loads(report.stdout)["phases"]:
            if phase["phase"] != "ready":
                phases[phase["phase"]] = phases.get(phase["phase"], 0.0) + phase["seconds"]
        return Started(seconds, phases)

    def precompile(self, caches: Path) -> None:
        """`tensorserve precompile`: what vLLM compiles is sealed beside the bundle.

        `caches`: as in the starts that shall find it; compiled code holds absolute paths.
        """
        settings = self._settings(caches) | {"TENSORSERVE_MODEL_NAME": "model"}
        words = ["tensorserve", "precompile", self.packed.uri]
        running = self._running(words, settings, 0, caches)
        subprocess.run(running.command, env=running.environment, check=True)

    def stock(self, *more: str, caches: Path | None = None, **environment: str) -> Started:
        """Stock `vllm serve` of the directory on local disk, with the same flags."""
        (port,) = free_ports(1)
        flags: list[str] = []
        for name, value in self._flags().items():
            flag = "--" + name.lower().replace("_", "-")
            flags += [flag] if value == "true" else [flag, value]
        words = ["vllm", "serve", str(self.packed.directory), "--host", "127.0.0.1"]
        words += ["--port", str(port), "--served-model-name", "model", *flags, *more]
        ends: dict[str, float] = {}
        # Without our plugin, which would change what vLLM finds in its caches.
        settings = CPU_ENVIRONMENT | {"VLLM_PLUGINS": ""} | _cache_variables(caches) | environment
        seconds = _time(self._running(words, settings, port, caches), ends)
        phases: dict[str, float] = {}
        last = 0.0
        for phase, end in [*ends.items(), ("the rest", seconds)]:
            phases[phase] = end - last
            last = end
        return Started(seconds, phases)

    def _flags(self) -> dict[str, str]:
        return {**_FLAGS, **self.packed.flags, **({} if self.compiled else _EAGER)}

    def _settings(self, caches: Path | None) -> dict[str, str]:
        given = (
            CPU_ENVIRONMENT
            | self.server.environment
            | _cache_variables(caches)
            | {f"TENSORSERVE_VLLM_{name}": value for name, value in self._flags().items()}
            | {
                "TENSORSERVE_MODEL_URI": self.packed.uri,
                "TENSORSERVE_KEY_FILE": str(self.packed.key_file),
            }
        )
        if "PYTHONPATH" in os.environ and self.image is None:
            given["PYTHONPATH"] = os.environ["PYTHONPATH"]
        return given

    def _running(
        self, words: list[str], settings: dict[str, str], port: int, *writes: Path | None
    ) -> Running:
        log = self.directory / "log"
        if self.image is None:
            command = [str(BIN / words[0]), *words[1:]]
            return Running(command, clean_environment() | settings, log, port)
        mounted = (path for path in writes if path is not None)
        visible = (self.packed.directory, self.packed.key_file, *mounted)
        command, environment = in_container(self.image, words, settings, visible)
        return Running(command, environment, log, port)


def _cache_variables(caches: Path | None) -> dict[str, str]:
    """With them, everything that vLLM and torch compile is kept in `caches`."""
    if caches is None:
        return {}
    (caches / "tmp").mkdir(parents=True, exist_ok=True)
    return {
        "HOME": str(caches),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        # Without a directory of its own, torch compiles into the one for temporary files.
        "TMPDIR": str(caches / "tmp"),
    }


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


def pack(name: str, size: int, server: S3Server) -> Packed:
    """The model's directory, and the encrypted bundle in the bucket, made once."""
    if name == "smollm2":
        packed = Packed(
            "SmolLM2-135M-Instruct", ensure_smollm2(), CACHE / "smollm2.key", _SMOLLM2_FLAGS
        )
    else:
        model = ensure_model(size)
        packed = Packed(model.directory.name, model.hugging_face, model.key_file, {})
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
