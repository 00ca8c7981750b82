"""The cpu image as `docker run` has it: what it makes of its arguments, and what it ends with."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from containers import IMAGE, LOCAL, USER, complaints, needs_podman, podman, run
from running import request
from s3server import free_ports

from tensorserve.cli import main as tensorserve
from tensorserve.version import __version__
from waiting import wait_for

pytestmark = needs_podman
ROOT = Path(__file__).parents[2]


def test_the_documented_command_starts(bundle: Path) -> None:
    """docs/image.md's `docker run`, word for word but for the ports, and what podman needs here."""
    text = (ROOT / "docs/image.md").read_text()
    (block,) = re.findall(r"^    docker run (--user (?:.*\\\n)*.*)$", text, re.MULTILINE)
    api, metrics = free_ports(2)
    block = block.replace("\\\n", " ").replace("$PWD", str(bundle))
    block = block.replace("-p 8000:8000 -p 9400:9400", f"-p {api}:8000 -p {metrics}:9400")
    block = block.replace("/model.key:/run", "/key:/run").replace(" tensorserve:cpu", f" {IMAGE}")
    block = block.replace("tensorserve-cache:", "tensorserve-test-documented:")
    block = block.replace("$(id -u)", str(USER))
    name = "tensorserve-test-documented"
    podman("rm", "--force", name)
    done = podman("run", "--detach", "--name", name, *LOCAL, *shlex.split(block))
    try:
        assert done.returncode == 0, done.stderr
        url = f"http://127.0.0.1:{metrics}/startupz"
        wait_for(
            lambda: b'"phase": "import"' in request(url)[1],
            60,
            every=0.2,
            said=lambda: "vLLM was not started",
        )
        logs = podman("logs", name)
        assert complaints(logs.stdout + logs.stderr) == []
    finally:
        podman("rm", "--force", name)
        podman("volume", "rm", name)


def test_the_documented_packing_packs(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/image.md's `pack`, as a user of whom the image knows nothing."""
    text = (ROOT / "docs/image.md").read_text()
    (line,) = re.findall(r"^    docker run (--rm .* pack .*)$", text, re.MULTILINE)
    shutil.copytree(model_dir, tmp_path / "my-model")
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, USER, 0)
    for path in tmp_path.parents[:2]:
        path.chmod(0o755)
    line = line.replace("$(id -u)", str(USER)).replace("$PWD", str(tmp_path))
    line = line.replace(" tensorserve:cpu", f" {IMAGE}")
    done = podman("run", *LOCAL, *shlex.split(line))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.key").stat().st_uid == USER
    assert tensorserve(["verify", str(tmp_path / "bundle")]) == 78
    monkeypatch.setenv("TENSORSERVE_KEY_FILE", str(tmp_path / "model.key"))
    assert tensorserve(["verify", str(tmp_path / "bundle")]) == 0


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


# Any port that is free; these containers are on the host's network.
NO_BUNDLE = {"TENSORSERVE_MODEL_URI": "/nothing"}


def test_a_missing_bundle_ends_the_container_with_its_code() -> None:
    """65 from the engine, through supervisord and `up`."""
    (port,) = free_ports(1)
    done = run(environ=NO_BUNDLE | {"TENSORSERVE_METRICS_PORT": str(port)})
    assert done.returncode == 65, done.stderr
    assert "/nothing does not exist" in done.stderr


def test_our_part_of_a_start_needs_no_shell(tmp_path: Path) -> None:
    """With every shell out of the way, `up`, supervisord, the engine program and its code work."""
    masked = tmp_path / "not-a-shell"
    masked.touch(mode=0o644)
    shells = ("/usr/bin/dash", "/usr/bin/bash")
    mounts = tuple(f"--volume={masked}:{shell}:ro" for shell in shells)
    (port,) = free_ports(1)
    environ = NO_BUNDLE | {"TENSORSERVE_METRICS_PORT": str(port)}
    assert run("sh", "-c", "true", options=mounts).returncode == 126
    assert run(environ=environ, options=mounts).returncode == 65


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("tensorserve", "--version"), 0, f"tensorserve {__version__}"),
        (("echo", "hello"), 0, "hello"),
        (("python", "-c", "print(6 * 7)"), 0, "42"),
        (("python", "-c", "raise SystemExit(3)"), 3, ""),
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


def test_the_labels_say_what_the_image_is() -> None:
    """The version is the package's; the base is the one it was built on."""
    done = podman("image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE)
    labels = json.loads(done.stdout)
    prefix = "org.opencontainers.image."
    assert labels[prefix + "version"] == __version__
    assert labels[prefix + "licenses"] == "Apache-2.0"
    assert labels[prefix + "base.name"]


def test_the_default_base_is_pinned_by_its_digest() -> None:
    """A tag may be moved; what was tested is what is built on."""
    text = (ROOT / "docker/Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"debian:[\w.-]+@sha256:[0-9a-f]{64}", base)


def test_our_cipher_is_built_in_where_the_processor_can() -> None:
    """Without it everything works, at a third of the speed: nobody would notice."""
    script = (
        "from tensorserve.crypto import backends; from pathlib import Path;"
        "print(Path(backends.__file__).with_name('_secretbox.so').exists(), "
        "backends.fastest_box().name)"
    )
    able = "avx512ifma" in Path("/proc/cpuinfo").read_text()
    assert run("python", "-c", script).stdout.split() == [
        "True",
        "AVX-512" if able else "libsodium",
    ]


def test_vllm_takes_what_the_image_knows_of_its_models() -> None:
    """It does not look at the class again; hundreds of models are known."""
    script = (
        "import json, os, pathlib; shared = '/opt/tensorserve/share/vllm';"
        "os.environ['VLLM_CACHE_ROOT'] = shared;"
        "from vllm.model_executor.models import registry;"
        "registry._run_in_subprocess = None;"
        "info = registry.ModelRegistry.models['LlamaForCausalLM'].inspect_model_cls();"
        "known = json.loads((pathlib.Path(shared) / 'architectures.json').read_text());"
        "print(info.is_text_generation_model, len(known) > 200)"
    )
    # torch wants to write where a start has its volume.
    done = run("python", "-c", script, environ={"TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor"})
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_the_build_left_nothing_in_the_cache() -> None:
    """What root had made there, another user could not write to."""
    assert run("find", "/var/lib/tensorserve/cache", "-mindepth", "1").stdout == ""
