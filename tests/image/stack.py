"""Runs a profile of compose.yaml as a user does, by podman-compose."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from running import request
from s3server import free_ports

from waiting import wait_for

ROOT = Path(__file__).parents[2]
PROJECT = "tensorserve-test"
IMAGES = {
    "TENSORSERVE_CPU_IMAGE": "localhost/tensorserve:cpu",
    "TENSORSERVE_DEMO_IMAGE": "localhost/tensorserve:demo",
    "PROMETHEUS_IMAGE": "localhost/tensorserve-test-prometheus",
}


class Stack:
    """The demo's containers on free ports; all gone at the end, volumes and networks too."""

    def __init__(
        self, profile: str = "demo", before: tuple[str, ...] = ("pack", "prometheus")
    ) -> None:
        """`before`: the one-shot that packs, and what else starts before the product does."""
        self.profile, self._before = profile, before
        self.product = "demo" if profile == "demo" else f"demo-{profile}"
        self.api, self.metrics, self.prometheus = free_ports(3)
        self._environment = os.environ | IMAGES | {
            "API": f"127.0.0.1:{self.api}",
            "METRICS": f"127.0.0.1:{self.metrics}",
            "PROMETHEUS": f"127.0.0.1:{self.prometheus}",
            "RESTART": "no",
        }  # fmt: skip

    def compose(self, *words: str, check: bool = True, also: tuple[str, ...] = ()) -> str:
        """`docker compose --profile PROFILE WORDS`, by podman.

        `also`: more profiles; docker switches that of a service that is named on by itself.
        """
        files = [ROOT / "compose.yaml", ROOT / "tests/image/compose.podman.yaml"]
        program = str(Path(sys.executable).with_name("podman-compose"))
        options = [word for file in files for word in ("--file", str(file))]
        profiles = [word for name in (self.profile, *also) for word in ("--profile", name)]
        done = subprocess.run(
            [program, "--project-name", PROJECT, *options, *profiles, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def __enter__(self) -> Stack:
        self.compose("down", "--volumes", check=False)
        # In the order that `depends_on` gives: podman 4.3 itself cannot start a container that
        # depends on one that has finished.
        self.compose("up", "--no-build", "--detach", *self._before)
        pack = self._before[0]
        self.wait(lambda: self.state(pack, "Status") == "exited", "pack to finish", 120)
        assert self.state(pack, "ExitCode") == "0", self.log(pack)
        self.compose("up", "--no-build", "--no-deps", "--detach", self.product)
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", check=False)

    def container(self, service: str) -> str:
        return f"{PROJECT}_{service}_1"

    def state(self, service: str, field: str) -> str:
        words = ["inspect", "--format", f"{{{{.State.{field}}}}}", self.container(service)]
        return subprocess.run(
            ["podman", *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    def log(self, service: str) -> str:
        done = subprocess.run(
            ["podman", "logs", self.container(service)], capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    def exec(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["podman", "exec", self.container(service), *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        wait_for(condition, seconds, every=0.5, said=lambda: what)

    def query(self, expression: str) -> list[float]:
        """The values that Prometheus gives for an expression."""
        text = urllib.parse.quote(expression)
        status, body = request(f"http://127.0.0.1:{self.prometheus}/api/v1/query?query={text}")
        if status != 200:
            return []
        return [float(result["value"][1]) for result in json.loads(body)["data"]["result"]]


def ask(stack: Stack) -> str:
    """What the model says to docs/compose.md's request."""
    page = (ROOT / "docs/compose.md").read_text()
    (block,) = re.findall(
        r"^    (curl -s http://127\.0\.0\.1:8000(?:.*\\\n)*.*)$", page, re.MULTILINE
    )
    words = shlex.split(block.replace("\\\n", " "))
    url, body = words[2].replace(":8000", f":{stack.api}"), words[words.index("-d") + 1]
    status, answer = request(url, body.encode())
    assert status == 200, answer
    return str(json.loads(answer)["choices"][0]["message"]["content"])
