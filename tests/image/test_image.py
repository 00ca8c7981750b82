"""The cpu image, run as a user would run it: `docker run` semantics, every hardening flag on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import request
from s3server import free_ports

from tensorserve import __version__
from tensorserve.cli import main as tensorserve

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

pytestmark = pytest.mark.skipif(shutil.which(ENGINE) is None, reason="podman is not installed")


def run(*words: str, environ: dict[str, str] | None = None, timeout: float = 60):
    """`docker run --rm IMAGE words`, hardened."""
    options = [word for n, v in (environ or {}).items() for word in ("-e", f"{n}={v}")]
    return subprocess.run(
        [ENGINE, "run", "--rm", *HARDENED, *LOCAL, *options, IMAGE, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Container:
    """One container, started in the background; removed at the end."""

    def __init__(self, name: str, *options: str, words: tuple[str, ...] = ()) -> None:
        self.name = name
        self.port, self.metrics_port = free_ports(2)
        self._command = [
            ENGINE, "run", "--detach", "--name", name, *HARDENED, *LOCAL,
            "-e", f"TENSORSERVE_PORT={self.port}", "-e", "TENSORSERVE_HOST=127.0.0.1",
            "-e", f"TENSORSERVE_METRICS_PORT={self.metrics_port}",
            "-e", "TENSORSERVE_METRICS_HOST=127.0.0.1",
            "-e", "VLLM_CPU_KVCACHE_SPACE=1", *options, IMAGE, *words,
        ]  # fmt: skip

    def __enter__(self) -> Container:
        subprocess.run([ENGINE, "rm", "--force", self.name], check=False, capture_output=True)
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([ENGINE, "rm", "--force", self.name], check=False, capture_output=True)

    @property
    def log(self) -> str:
        done = subprocess.run(
            [ENGINE, "logs", self.name], capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    def state(self, field: str) -> str:
        words = [ENGINE, "inspect", "--format", f"{{{{.State.{field}}}}}", self.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    def wait_ready(self, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while request(f"http://127.0.0.1:{self.metrics_port}/readyz")[0] != 200:
            assert self.state("Running") == "true", self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.5)

    def healthcheck(self) -> int:
        words = [ENGINE, "healthcheck", "run", self.name]
        return subprocess.run(words, capture_output=True, check=False).returncode


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """The encrypted model and its key, readable by whatever user the container has."""
    base = tmp_path_factory.mktemp("bundle")
    words = ["pack", str(model_dir), str(base / "model"), "--encrypt"]
    assert tensorserve([*words, "--key-file", str(base / "key")]) == 0
    (base / "key").chmod(0o444)
    for path in (base, *base.parents[:2]):
        path.chmod(0o755)
    return base


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Container]:
    """Started with no arguments, as an arbitrary user of group 0, from a read-only mount."""
    options = [
        "--user", "123456:0",
        "--volume", f"{bundle / 'model'}:/models/smollm2:ro",
        "--volume", f"{bundle / 'key'}:/run/secrets/model-key:ro",
        "-e", "TENSORSERVE_MODEL_URI=/models/smollm2",
        "-e", "TENSORSERVE_KEY_FILE=/run/secrets/model-key",
        "-e", "TENSORSERVE_VLLM_MAX_MODEL_LEN=512",
        "-e", "TENSORSERVE_VLLM_DTYPE=float32",
        "-e", "TENSORSERVE_VLLM_ENFORCE_EAGER=true",
        "--tmpfs=/var/lib/tensorserve/cache:mode=1777,exec",
    ]  # fmt: skip
    with Container("tensorserve-test-served", *options) as container:
        assert container.healthcheck() != 0
        container.wait_ready()
        yield container


def test_it_serves_with_every_hardening_flag_as_an_arbitrary_user(served: Container) -> None:
    """Read-only, no capabilities, no new privileges, no root: and it answers."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 16,
    }
    url = f"http://127.0.0.1:{served.port}/v1/chat/completions"
    status, answer = request(url, json.dumps(body).encode())
    assert status == 200, answer
    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]


def test_the_health_check_says_healthy_when_ready(served: Container) -> None:
    """It was unhealthy before (the fixture asked), and is healthy now."""
    assert served.healthcheck() == 0


def test_the_log_holds_no_warning_or_error_of_ours(served: Container) -> None:
    """Nothing to explain away; vLLM's own lines are vLLM's."""
    ours = [line for line in served.log.splitlines() if line.startswith("tensorserve")]
    assert any("ready after" in line for line in ours), served.log
    assert [line for line in ours if "warning" in line.lower() or "error" in line.lower()] == []
    assert "Traceback" not in served.log


def test_it_does_not_run_as_root(served: Container) -> None:
    """The user is the one that was asked for, without capabilities."""
    done = subprocess.run(
        [ENGINE, "exec", served.name, "cat", "/proc/1/status"],
        capture_output=True,
        text=True,
        check=True,
    )
    fields = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert fields["Uid"].split()[0] == "123456"
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_the_labels_say_what_the_image_is() -> None:
    """The version is the package's; the base is the one it was built on."""
    words = [ENGINE, "image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    labels = json.loads(done.stdout)
    prefix = "org.opencontainers.image."
    assert labels[prefix + "version"] == __version__
    assert labels[prefix + "licenses"] == "Apache-2.0"
    assert labels[prefix + "base.name"]


def test_docker_stop_ends_it_in_order(served: Container) -> None:
    """SIGTERM to PID 1: exit code 143, well inside docker's patience. (The last of `served`.)"""
    started = time.monotonic()
    subprocess.run([ENGINE, "stop", "--time", "10", served.name], check=True, capture_output=True)
    assert time.monotonic() - started < 9
    assert int(served.state("ExitCode")) == 128 + signal.SIGTERM


def test_the_documented_command_starts(bundle: Path) -> None:
    """docs/image.md's `docker run`, word for word but for the ports, and what podman needs here."""
    text = (Path(__file__).parents[2] / "docs/image.md").read_text()
    (block,) = re.findall(r"^    docker run ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    api, metrics = free_ports(2)
    block = block.replace("\\\n", " ").replace("$PWD", str(bundle))
    block = block.replace("-p 8000:8000 -p 9400:9400", f"-p {api}:8000 -p {metrics}:9400")
    block = block.replace("/model.key:/run", "/key:/run").replace(" tensorserve:cpu", f" {IMAGE}")
    name = "tensorserve-test-documented"
    subprocess.run([ENGINE, "rm", "--force", name], check=False, capture_output=True)
    words = [ENGINE, "run", "--detach", "--name", name, *LOCAL, *shlex.split(block)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 60
        while (
            '"phase": "import"' not in request(f"http://127.0.0.1:{metrics}/startupz")[1].decode()
        ):
            assert time.monotonic() < deadline, "vLLM was not started"
            time.sleep(0.2)
    finally:
        subprocess.run([ENGINE, "rm", "--force", name], check=False, capture_output=True)
        subprocess.run(
            [ENGINE, "volume", "rm", "tensorserve-cache"], check=False, capture_output=True
        )


@pytest.fixture
def cache_volume() -> Iterator[str]:
    name = "tensorserve-test-cache"
    subprocess.run([ENGINE, "volume", "rm", "--force", name], check=False, capture_output=True)
    yield name
    subprocess.run([ENGINE, "volume", "rm", "--force", name], check=False, capture_output=True)


def test_a_second_start_finds_what_the_first_has_compiled(bundle: Path, cache_volume: str) -> None:
    """With the cache on a volume: a new container compiles nothing again."""
    options = [
        "--volume", f"{bundle / 'model'}:/models/smollm2:ro",
        "--volume", f"{bundle / 'key'}:/run/secrets/model-key:ro",
        "--volume", f"{cache_volume}:/var/lib/tensorserve/cache",
        "-e", "TENSORSERVE_MODEL_URI=/models/smollm2",
        "-e", "TENSORSERVE_KEY_FILE=/run/secrets/model-key",
        "-e", "TENSORSERVE_VLLM_MAX_MODEL_LEN=512",
        "-e", "TENSORSERVE_VLLM_DTYPE=float32",
    ]  # fmt: skip
    kernels: list[set[str]] = []
    for number in (1, 2):
        with Container(f"tensorserve-test-cache-{number}", *options) as container:
            container.wait_ready()
            # Names and times: a kernel that was compiled again would have another time.
            words = "find /var/lib/tensorserve/cache -name '*.so' -printf '%p %T@\\n'"
            done = subprocess.run(
                [ENGINE, "exec", container.name, "sh", "-c", words],
                capture_output=True,
                text=True,
                check=True,
            )
            kernels.append(set(done.stdout.splitlines()))
    assert len(kernels[0]) > 5, kernels
    assert kernels[1] == kernels[0]


def test_no_arguments_and_no_settings_say_what_to_set() -> None:
    """Exit code 78, one message."""
    done = run()
    assert done.returncode == 78
    assert "TENSORSERVE_MODEL_URI is not set" in done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_that_begin_with_a_dash_go_to_vllm() -> None:
    """And are checked on the way."""
    done = run("--max-model-lenght", "4096", environ={"TENSORSERVE_MODEL_URI": "/m"})
    assert done.returncode == 78
    assert "Did you mean --max-model-len" in done.stderr


def test_a_missing_bundle_ends_the_container_with_its_code() -> None:
    """65 from the engine, through supervisord and `up`."""
    done = run(environ={"TENSORSERVE_MODEL_URI": "/nothing", "TENSORSERVE_METRICS_PORT": "9499"})
    assert done.returncode == 65, done.stderr
    assert "/nothing/model.tensors does not exist" in done.stderr


def test_our_part_of_a_start_needs_no_shell(tmp_path: Path) -> None:
    """With every shell out of the way, `up`, supervisord, the engine program and its code work."""
    masked = tmp_path / "not-a-shell"
    masked.touch(mode=0o644)
    shells = ("/usr/bin/dash", "/usr/bin/bash")
    mounts = [word for shell in shells for word in ("--volume", f"{masked}:{shell}:ro")]
    command = [ENGINE, "run", "--rm", *HARDENED, *LOCAL, *mounts]
    options = ["-e", "TENSORSERVE_MODEL_URI=/nothing", "-e", "TENSORSERVE_METRICS_PORT=9498"]
    for words, code in ((["sh", "-c", "true"], 126), ([], 65)):
        done = subprocess.run(
            [*command, *options, IMAGE, *words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("tensorserve", "--version"), 0, "tensorserve 0.1.0"),
        (("echo", "hello"), 0, "hello"),
        (("python", "-c", "print(6 * 7)"), 0, "42"),
        (("no-such-program",), 127, "neither a command"),
    ],
)
def test_other_programs_run_as_given(words: tuple[str, ...], code: int, said: str) -> None:
    """As people know it from other images."""
    done = run(*words)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_the_root_file_system_cannot_be_written() -> None:
    """The image needs no writable root: what it writes goes to a tmpfs or a volume."""
    done = run("touch", "/opt/tensorserve/x")
    assert done.returncode != 0
    assert "Read-only" in done.stderr
