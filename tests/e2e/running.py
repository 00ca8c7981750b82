"""Runs an engine as a user would, with a clean environment, and talks to it over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from s3server import free_ports

from waiting import wait_for

BIN = Path(sys.executable).parent
READY_SECONDS = 240.0
# Settings that make vLLM's CPU build start as fast as it can; the same for all engines compared.
ENGINE_FLAGS = {"ENFORCE_EAGER": "true", "MAX_MODEL_LEN": "512", "MAX_NUM_SEQS": "4"}
# Stock vLLM is asked these once a session (conftest.py), for all that compare SmolLM2's answers.
STOCK_PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Once upon a time, in a small village,",
    "1 2 3 4",
]
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# Of an eager engine, torch compiles small functions at the first request. It checks the compiler in
# each process first, and 60 s are too few on a busy machine: the engine then dies
# (torch/_inductor/cpu_vec_isa.py, 2.13.0).
UNCOMPILED = {"TORCH_COMPILE_DISABLE": "1"}


def forking() -> dict[str, str]:
    """Variables with which stock vLLM forks its processes, so that it is imported once.

    torch compiles nothing. Its check of the compiler has 60 s in each process, on a busy machine
    too few: the engine then dies (torch/_inductor/cpu_vec_isa.py, 2.13.0).
    One OpenMP thread: a process that was forked cannot use the threads of its parent. The libraries
    are those that vLLM's CPU build preloads when it spawns (vllm/platforms/cpu.py, 0.32.0).
    """
    found = []
    for package, pattern in (("vllm", "libs/libtcmalloc*.so*"), ("torch", "lib/libgomp*.so*")):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        found += sorted(Path(spec.origin).parent.glob(pattern))[:1]
    return {
        "PYTHONPATH": str(Path(__file__).with_name("forking")),
        "LD_PRELOAD": ":".join(map(str, found)),
        "OMP_NUM_THREADS": "1",
        **UNCOMPILED,
    }


def clean_environment() -> dict[str, str]:
    """What every run gets: enough to find programs, nothing of this machine's settings."""
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/tmp")}


class Running:
    """One engine: `tensorserve up`, or stock `vllm serve` to compare with."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, port: int
    ) -> None:
        self.command = command
        self.environment = environment
        self.log = log
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def text(self) -> str:
        """Everything that it printed so far."""
        return self.log.read_text(errors="replace")

    def start(self) -> None:
        """Start it; does not wait."""
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until /health answers; fail as soon as the process ends."""
        self.wait_for(lambda: self.get("/health")[0] == 200, READY_SECONDS)

    def wait_for(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for `condition`; fail as soon as the process ends."""

        def holds() -> bool:
            assert self.process is not None
            if condition():
                return True
            code = self.process.poll()
            assert code is None, f"ended with {code}:\n{self.text[-4000:]}"
            return False

        wait_for(holds, seconds, every=0.1, said=lambda: self.text[-4000:])

    def get(self, path: str, port: int | None = None) -> tuple[int, bytes]:
        """(status, body); status 0 where nobody answers."""
        return request(f"http://127.0.0.1:{port or self.port}{path}")

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        """(status, parsed JSON)."""
        status, data = request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers
        )
        return status, json.loads(data) if data else None

    def completions(self, model: str, prompts: list[str]) -> list[tuple[str, list[float]]]:
        """(greedy text, log-probabilities of its tokens) for each prompt."""
        results = []
        for prompt in prompts:
            status, answer = self.post(
                "/v1/completions",
                {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": 24,
                    "temperature": 0,
                    "logprobs": 1,
                    "seed": 0,
                },
            )
            assert status == 200, f"{answer}\n{self.text[-8000:]}"
            choice = answer["choices"][0]
            results.append((choice["text"], choice["logprobs"]["token_logprobs"]))
        return results

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Signal the process itself (as `docker stop` does), wait, give its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Leave nothing behind, whatever went wrong."""
        assert self.process is not None
        end_session(self.process)

    def __enter__(self) -> Running:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()


class Tensorserve(Running):
    """`tensorserve up` on free ports, with a state directory of its own.

    With `spawn`, or where tests run with TEST_IMPORT_ONCE=off, vLLM is imported after the checks,
    and again in each of its processes.
    """

    def __init__(
        self, directory: Path, environ: dict[str, str], *arguments: str, spawn: bool = False
    ) -> None:
        port, self.metrics_port = free_ports(2)
        self.state_dir = directory / "state"
        once = "off" if spawn else os.environ.get("TEST_IMPORT_ONCE", "auto")
        environment = (
            clean_environment()
            | CPU_ENVIRONMENT
            | {"TENSORSERVE_IMPORT_ONCE": once}
            | {f"TENSORSERVE_VLLM_{name}": value for name, value in ENGINE_FLAGS.items()}
            | {
                "TENSORSERVE_STATE_DIR": str(self.state_dir),
                "TENSORSERVE_HOST": "127.0.0.1",
                "TENSORSERVE_METRICS_HOST": "127.0.0.1",
                "TENSORSERVE_PORT": str(port),
                "TENSORSERVE_METRICS_PORT": str(self.metrics_port),
                "TENSORSERVE_MODEL_NAME": "model",
                # Nobody scrapes most of these starts.
                "TENSORSERVE_FAILURE_LINGER": "0",
            }
            | environ
        )
        if environment["TENSORSERVE_VLLM_ENFORCE_EAGER"] == "true":
            environment |= UNCOMPILED
        command = [str(BIN / "tensorserve"), "up", *(("--", *arguments) if arguments else ())]
        super().__init__(command, environment, directory / "up.log", port)

    def events(self) -> list[dict[str, Any]]:
        """The event log so far."""
        path = self.state_dir / "events.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample of /metrics, or None."""
        from prometheus_client.parser import text_string_to_metric_families

        status, body = self.get("/metrics", self.metrics_port)
        if status != 200:
            return None
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return None

    def wait_ready(self) -> None:
        """Wait until the probe says ready: vLLM answers and the load is complete."""
        self.wait_for(lambda: self.get("/readyz", self.metrics_port)[0] == 200, READY_SECONDS)


def stock_vllm(directory: Path, model: Path) -> Running:
    """Stock `vllm serve` on a Hugging Face directory, with the same flags; it forks."""
    (port,) = free_ports(1)
    flags = []
    for name, value in ENGINE_FLAGS.items():
        flag = "--" + name.lower().replace("_", "-")
        flags += [flag] if value == "true" else [flag, value]
    command = [
        str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "model", *flags,
    ]  # fmt: skip
    environment = clean_environment() | CPU_ENVIRONMENT | forking()
    return Running(command, environment, directory / "vllm.log", port)


def request(
    url: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    """(status, body); status 0 where nobody answers."""
    message = urllib.request.Request(
        url, body, {"Content-Type": "application/json", **(headers or {})}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        # Two ranks that spin on cores which other tests use as well take minutes for a prompt.
        with opener.open(message, timeout=300 if body else 60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def end_session(leader: subprocess.Popen[Any]) -> None:
    """Kill all processes of the session that `leader` leads, and their descendants."""
    for pid in session_processes(leader.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    leader.wait()


def session_processes(session: int) -> list[int]:
    """Processes of a session and all their descendants that still are (zombies left out)."""
    parents: dict[int, int] = {}
    members: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] == "Z":
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        if int(fields[3]) == session:
            members.add(pid)
    while True:
        more = {pid for pid, parent in parents.items() if parent in members} - members
        if not more:
            return sorted(members)
        members |= more
