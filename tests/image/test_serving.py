"""The cpu image serves an encrypted model, hardened, as any user; its cache is found again."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import USER, Container, complaints, needs_podman, podman
from running import request

pytestmark = needs_podman


def options(bundle: Path, cache_volume: str) -> list[str]:
    """As an arbitrary user of group 0, from a read-only mount, with the cache on a volume."""
    return [
        "--user", f"{USER}:0",
        "--volume", f"{bundle / 'model'}:/models/smollm2:ro",
        "--volume", f"{bundle / 'key'}:/run/secrets/model-key:ro",
        "--volume", f"{cache_volume}:/var/lib/tensorserve/cache",
        "-e", "TENSORSERVE_MODEL_URI=/models/smollm2",
        "-e", "TENSORSERVE_KEY_FILE=/run/secrets/model-key",
        "-e", "TENSORSERVE_VLLM_MAX_MODEL_LEN=512",
        "-e", "TENSORSERVE_VLLM_DTYPE=float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def served(bundle: Path, cache_volume: str) -> Iterator[Container]:
    """Started with no arguments; vLLM compiles the model, as it does where nobody forbids it."""
    with Container("tensorserve-test-served", *options(bundle, cache_volume)) as container:
        assert podman("healthcheck", "run", container.name).returncode != 0
        container.wait_ready()
        yield container


def test_it_serves_hardened_as_an_arbitrary_user(served: Container) -> None:
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
    assert podman("healthcheck", "run", served.name).returncode == 0


def test_the_log_holds_no_warning_or_error_of_ours(served: Container) -> None:
    """Nothing to explain away; vLLM's own lines are vLLM's."""
    assert "ready after" in served.log
    assert complaints(served.log) == []


def test_it_does_not_run_as_root(served: Container) -> None:
    """The user is the one that was asked for, without capabilities."""
    lines = served.exec("cat", "/proc/1/status").splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert fields["Uid"].split()[0] == "123456"
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_no_process_may_dump_core(served: Container) -> None:
    """A core file would hold the key and the weights in plain text; nobody may raise the limit."""
    program = (
        "import os, pathlib\n"
        "for process in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    if process.name != str(os.getpid()):\n"
        "        limits = (process / 'limits').read_text().splitlines()\n"
        "        print(*[x for x in limits if 'core file' in x][0].split()[4:6])\n"
    )
    limits = served.exec("python", "-c", program).splitlines()
    assert len(limits) > 5
    # 1: unlike 0, it also holds where the host hands cores to a program (linux.no_core_files).
    assert set(limits) <= {"0 0", "1 1"}


def test_the_images_model_infos_are_in_vllms_cache(served: Container) -> None:
    """Before vLLM looks, which would take it another import of itself."""
    name = "vllm-model_executor-models-llama-LlamaForCausalLM.json"
    held = f"/var/lib/tensorserve/cache/vllm/modelinfos/{name}"
    # What vLLM finds out itself is readable by its user alone.
    assert served.exec("stat", "--format=%a", held).strip() == "644"
    served.exec("cmp", f"/opt/tensorserve/share/vllm/modelinfos/{name}", held)


def test_pid_1_reaps_what_others_leave_behind(served: Container) -> None:
    """An orphan becomes PID 1's child when its parent ends; it leaves no zombie."""
    program = (
        "import os, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    orphan = os.fork()\n"
        "    if orphan == 0:\n"
        "        while os.getppid() != 1: time.sleep(0.01)\n"
        "        os._exit(0)\n"
        "    os.write(write, str(orphan).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "orphan = os.read(read, 20).decode()\n"
        "deadline = time.monotonic() + 20\n"
        "while os.path.exists('/proc/' + orphan) and time.monotonic() < deadline:\n"
        "    time.sleep(0.05)\n"
        "print(os.path.exists('/proc/' + orphan))\n"
    )
    assert served.exec("python", "-c", program).strip() == "False"


def test_docker_stop_ends_it_and_the_next_start_has_its_kernels(
    served: Container, bundle: Path, cache_volume: str
) -> None:
    """SIGTERM to PID 1: 143, by itself. A new container compiles nothing.

    Patience beyond docker's 10 s: two ranks that spin in another test can take both cores.
    """
    compiled = served.compiled()
    assert len(compiled) > 5
    assert podman("stop", "--time", "40", served.name, timeout=90).returncode == 0
    assert int(served.state("ExitCode")) == 128 + signal.SIGTERM
    with Container("tensorserve-test-second", *options(bundle, cache_volume)) as second:
        second.wait_ready()
        assert second.compiled() == compiled
