"""Engines forked from one process that has imported vLLM (warm_vllm.py): seconds instead of half a
minute for each start.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from running import BIN, CPU_ENVIRONMENT, ENGINE_FLAGS, Running, clean_environment, forking
from s3server import free_ports

# Both engines are compared as they are without compilation: --enforce-eager leaves some of it.
ENVIRONMENT = CPU_ENVIRONMENT | {"TORCH_COMPILE_DISABLE": "1"}
PROGRAM = Path(__file__).with_name("warm_vllm.py")


class WarmVllm:
    """The process that has imported vLLM, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            env=clean_environment() | ENVIRONMENT | {"LD_PRELOAD": forking()["LD_PRELOAD"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def ask(self, **wish: Any) -> dict[str, Any]:
        """One wish, one answer: warm_vllm.py says which there are."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, words: list[str], environment: dict[str, str], log: Path) -> int:
        """The exit code of the program `words`; what it printed is in `log`."""
        return Forked(self, words, environment, log).wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{PROGRAM.name} ended with {self._process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> WarmVllm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()


class Forked:
    """A process that WarmVllm has forked, with what `Running` wants of a Popen."""

    def __init__(
        self, warm: WarmVllm, words: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self._warm = warm
        self.pid: int = warm.ask(words=words, environment=environment, log=str(log))["pid"]
        self._ended = os.pidfd_open(self.pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._code(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        code = self._code(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        signal.pidfd_send_signal(self._ended, number)

    def _code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = self._warm.ask(wait=self.pid)["code"]
            os.close(self._ended)
        return self.returncode


class ForkedEngine(Running):
    """`tensorserve serve` or `vllm serve`, forked."""

    def __init__(
        self, warm: WarmVllm, command: list[str], environment: dict[str, str], log: Path, port: int
    ) -> None:
        super().__init__(command, clean_environment() | ENVIRONMENT | environment, log, port)
        self._warm = warm

    def start(self) -> None:
        """Start it; does not wait."""
        self.process = Forked(self._warm, self.command, self.environment, self.log)  # type: ignore[assignment]


def stock(warm: WarmVllm, directory: Path, model: Path, flags: dict[str, str]) -> ForkedEngine:
    """Stock `vllm serve` on a Hugging Face directory."""
    (port,) = free_ports(1)
    command = [str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model"]
    for name, value in (ENGINE_FLAGS | flags).items():
        flag = "--" + name.lower().replace("_", "-")
        command += [flag] if value == "true" else [flag, value]
    return ForkedEngine(warm, command, {}, directory / "stock.log", port)


def ours(
    warm: WarmVllm, directory: Path, settings: dict[str, str], flags: dict[str, str]
) -> ForkedEngine:
    """`tensorserve serve` with the same flags."""
    (port,) = free_ports(1)
    environment = {
        # The process that it is forked from has imported vLLM.
        "TENSORSERVE_IMPORT_ONCE": "off",
        "TENSORSERVE_STATE_DIR": str(directory / "state"),
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_PORT": str(port),
        "TENSORSERVE_MODEL_NAME": "model",
    }
    environment |= {f"TENSORSERVE_VLLM_{k}": v for k, v in (ENGINE_FLAGS | flags).items()}
    command = [str(BIN / "tensorserve"), "serve"]
    return ForkedEngine(warm, command, environment | settings, directory / "ours.log", port)
