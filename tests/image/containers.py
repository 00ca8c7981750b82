"""Runs our image as a user would: `docker run` with every hardening flag on; by podman, here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from running import request
from s3server import free_ports

from waiting import wait_for

# An arbitrary user of group 0: nobody that the image knows.
USER = 123456
IMAGE = os.environ.get("TEST_IMAGE", "localhost/tensorserve:cpu")
ENGINE = "podman"
os.environ.setdefault("CONTAINERS_CONF", str(Path(__file__).with_name("containers.conf")))
# As README and compose.yaml tell users to run it.
HARDENED = [
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp:mode=1777,exec",
    "--shm-size=1g",
    "--network=host",
]
# What this machine's podman needs, and a user's engine does not: no systemd for health checks, and
# limits that may not be raised.
LOCAL = [
    "--health-interval=disable",
    "--ulimit=nofile=4096:4096",
    "--ulimit=nproc=4096:4096",
]

needs_podman = pytest.mark.skipif(shutil.which(ENGINE) is None, reason="podman is not installed")


def podman(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """One command of the container engine; its exit code is for the caller to look at."""
    return subprocess.run(
        [ENGINE, *words], capture_output=True, text=True, timeout=timeout, check=False
    )


def run(
    *words: str,
    environ: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
    image: str = IMAGE,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """`docker run --rm IMAGE words`, hardened; `timeout` in seconds."""
    variables = [word for n, v in (environ or {}).items() for word in ("-e", f"{n}={v}")]
    options = (*HARDENED, *LOCAL, *variables, *options)
    return podman("run", "--rm", *options, image, *words, timeout=timeout)


def complaints(log: str) -> list[str]:
    """The lines of a log that are ours and warn or tell of an error; vLLM's lines are vLLM's."""
    ours = [line for line in log.splitlines() if re.search(r"(^|\s)tensorserve( \w+)?:", line)]
    return [line for line in ours if re.search("warning|error", line, re.IGNORECASE)]


def tracebacks(log: str) -> list[str]:
    """Where a traceback begins; not vLLM's when it is stopped, which stock vLLM prints as well.

    Every other time its API server hears that the engine, which it has just ended, is dead.
    """
    return [
        line
        for before, line in pairwise(["", *log.splitlines()])
        if "Traceback" in line and not before.endswith("AsyncLLM output_handler failed.")
    ]


class Container:
    """One container, started in the background; removed at the end."""

    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.port, self.metrics_port = free_ports(2)
        self._command = [
            "run", "--detach", "--name", name, *HARDENED, *LOCAL,
            "-e", f"TENSORSERVE_PORT={self.port}", "-e", "TENSORSERVE_HOST=127.0.0.1",
            "-e", f"TENSORSERVE_METRICS_PORT={self.metrics_port}",
            "-e", "TENSORSERVE_METRICS_HOST=127.0.0.1",
            "-e", "VLLM_CPU_KVCACHE_SPACE=1", *options, IMAGE,
        ]  # fmt: skip

    def __enter__(self) -> Container:
        podman("rm", "--force", self.name)
        done = podman(*self._command)
        assert done.returncode == 0, done.stderr
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Whatever a test looks at: a warning or error of ours in the log fails it.
            if kind is None:
                assert complaints(self.log) == []
                assert tracebacks(self.log) == [], self.log
        finally:
            podman("rm", "--force", self.name)

    @property
    def log(self) -> str:
        done = podman("logs", self.name)
        return done.stdout + done.stderr

    def state(self, field: str) -> str:
        return podman("inspect", "--format", f"{{{{.State.{field}}}}}", self.name).stdout.strip()

    def exec(self, *words: str) -> str:
        """What a program prints that runs inside the container, beside ours."""
        done = podman("exec", self.name, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_ready(self, seconds: float = 240) -> None:
        def ready() -> bool:
            assert self.state("Running") == "true", self.log
            return request(f"http://127.0.0.1:{self.metrics_port}/readyz")[0] == 200

        wait_for(ready, seconds, every=0.5, said=lambda: self.log)

    def compiled(self) -> set[str]:
        """Kernels in the cache, with their times: one that is compiled again has another time."""
        cache = "/var/lib/tensorserve/cache"
        return set(self.exec("find", cache, "-name", "*.so", "-printf", "%p %T@\n").splitlines())
