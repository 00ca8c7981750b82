"""The fingerprint of compiled code: what is in it, and what differs between pods is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tensorserve.bundle.manifest import FileEntry, Manifest
from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.launch import compile_fingerprint
from tensorserve.launch.compile_fingerprint import (
    factors_of,
    fingerprint_of,
    flags,
    gpu_factors,
    packages,
    variables,
)
from tensorserve.launch.gpus import Gpu, Gpus

ROOT = Path("/cache/tensorserve-compiled")
MANIFEST = Manifest((FileEntry("config.json", 2, "ab" * 32),), {}, None, content_sha256="cd" * 32)
H200 = Gpu("GPU 0 (NVIDIA H200)", total=150 * 10**9, free=140 * 10**9, major=9)
GPUS = Gpus((H200, replace(H200, name="GPU 1 (NVIDIA H200)")), 8, "580.65.06", 13000)


def plan(*arguments: str, **environ: str) -> LaunchPlan:
    given = {"TENSORSERVE_MODEL_URI": "s3://bucket/model", "TENSORSERVE_STATE_DIR": "/run/one"}
    return make_plan(Settings.from_environment(given | environ), arguments)


def fingerprint(
    made: LaunchPlan | None = None,
    manifest: Manifest = MANIFEST,
    gpus: Gpus | None = GPUS,
    root: Path = ROOT,
) -> str:
    return fingerprint_of(factors_of(made or plan(), manifest, gpus, root))


def test_it_is_sha256_of_canonical_json() -> None:
    """The order of members has no part in it."""
    one, other = {"a": 1, "b": ["é"]}, {"b": ["é"], "a": 1}
    assert fingerprint_of(one) == fingerprint_of(other)
    assert len(fingerprint_of(one)) == 64
    assert fingerprint_of(one) != fingerprint_of({"a": 2, "b": ["é"]})


def test_all_factors_are_plain_json() -> None:
    """The same after it was written and read."""
    found = factors_of(plan(), MANIFEST, GPUS, ROOT)
    assert json.loads(json.dumps(found)) == found
    assert {"vllm-0.32.0+cpu"} < set(found["packages"])


def test_pods_of_one_deployment_have_the_same() -> None:
    """Other names, ports, addresses, keys, state directories, places of caches, logs."""
    one = fingerprint()
    for made in (
        plan("--port", "1234", "--host", "10.0.0.1", "--served-model-name", "other"),
        plan("--api-key", "secret", "--chat-template", "./x", "--log-level", "debug"),
        plan("--lora-modules", "a=/run/one/adapters/a"),
        plan(TENSORSERVE_STATE_DIR="/run/other", TENSORSERVE_MODEL_NAME="other"),
        plan(TENSORSERVE_MODEL_URI="/mnt/copy", TENSORSERVE_PORT="4321"),
        plan(VLLM_HOST_IP="10.0.0.1", VLLM_PORT="1234", CUDA_VISIBLE_DEVICES="6,7"),
        plan(VLLM_CACHE_ROOT="/other", TRITON_CACHE_DIR="/other", VLLM_LOGGING_LEVEL="DEBUG"),
        plan(LD_PRELOAD="libtcmalloc.so", TORCHINDUCTOR_CPP_DYNAMIC_THREADS="1"),
        plan(HOSTNAME="pod-7", HOME="/home/other", AWS_REGION="eu-central-1"),
    ):
        assert fingerprint(made) == one
    six = tuple(
        replace(gpu, name=gpu.name.replace("GPU ", "GPU 6"), free=1) for gpu in GPUS.visible
    )
    assert fingerprint(gpus=replace(GPUS, visible=six, present=2)) == one


@pytest.mark.parametrize(
    "other",
    [
        lambda: fingerprint(plan("--max-model-len", "512")),
        lambda: fingerprint(plan("--tensor-parallel-size", "2")),
        lambda: fingerprint(plan("--enforce-eager")),
        lambda: fingerprint(plan("--compilation-config.mode", "3")),
        lambda: fingerprint(plan("--cudagraph-capture-sizes", "1", "2")),
        lambda: fingerprint(plan("--max-lora-rank", "64")),
        lambda: fingerprint(plan(VLLM_USE_AOT_COMPILE="0")),
        lambda: fingerprint(plan(TORCHINDUCTOR_MAX_AUTOTUNE="1")),
        lambda: fingerprint(plan(CXX="clang++")),
        lambda: fingerprint(manifest=replace(MANIFEST, content_sha256="ef" * 32)),
        lambda: fingerprint(gpus=None),
        lambda: fingerprint(gpus=replace(GPUS, visible=GPUS.visible[:1])),
        lambda: fingerprint(gpus=replace(GPUS, driver="570.1")),
        lambda: fingerprint(gpus=replace(GPUS, visible=(replace(H200, total=8 * 10**10),) * 2)),
        lambda: fingerprint(root=Path("/elsewhere")),
    ],
)
def test_what_decides_about_compiled_code_changes_it(other: Callable[[], str]) -> None:
    """Flags, variables, the bundle, devices, and paths that caches hold."""
    assert other() != fingerprint()


def test_another_processor_or_interpreter_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for one with AMX ends another by SIGILL, or computes something else."""
    one = fingerprint()
    changes: list[tuple[Any, str, Any]] = [
        (compile_fingerprint, "processor_flags", lambda: ("avx2", "avx512f")),
        (compile_fingerprint.platform, "machine", lambda: "riscv64"),
        (compile_fingerprint.platform, "python_version", lambda: "3.99.0"),
        (compile_fingerprint.platform, "libc_ver", lambda: ("musl", "1.2")),
        (compile_fingerprint.sys, "prefix", "/elsewhere"),
        (compile_fingerprint, "packages", lambda _: {"vllm-0.33.0": ""}),
    ]
    for where, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert fingerprint() != one, name


def test_flags_are_as_vllm_takes_them() -> None:
    """The last of several; keys of an object one by one or as a whole; paths below the model's."""
    made = plan(
        "--max-model-len", "1", "--max_model_len=2", "--no-enable-prefix-caching",
        "--compilation-config.mode", "3", "--cudagraph-capture-sizes", "1", "2",
        "--speculative-config", '{"model": "/run/one/model/draft/d"}',
    )  # fmt: skip
    assert flags(made.arguments, made.model_dir) == {
        "load-format": "tensorizer",
        "max-model-len": "2",
        "enable-prefix-caching": False,
        "compilation-config": '{"mode": 3}',
        "cudagraph-capture-sizes": ["1", "2"],
        "speculative-config": '{"model": "tensorserve:/draft/d"}',
    }


def test_variables_that_count() -> None:
    """Those of compilers, and not those of one pod."""
    found = variables({"VLLM_USE_AOT_COMPILE": "1", "VLLM_PORT": "1", "PATH": "/", "CC": "gcc"})
    assert found == {"CC": "gcc", "VLLM_USE_AOT_COMPILE": "1"}


def test_what_is_left_out_vllm_leaves_out_too() -> None:
    """Else a start would take code for which vLLM has another key."""
    vllm = pytest.importorskip("vllm.envs")
    source = Path(vllm.__file__).read_text()
    ignored = source[source.index("ignored_factors: set[str] = {") :].partition("}")[0]
    ours = {name for name in compile_fingerprint._PER_POD if name in vllm.environment_variables}
    assert len(ours) > 20
    assert {name for name in ours if f'"{name}"' not in ignored} == set()


def test_gpus_of_which_nothing_is_known() -> None:
    """The CPU build; and a name without the driver's own."""
    assert gpu_factors(None) is None
    assert gpu_factors(Gpus((), 0)) is None
    found = gpu_factors(Gpus((Gpu("GPU 3"),), 1))
    assert found == {"kinds": [["", None, None]], "driver": None, "cuda": None}


class TestPackages:
    """By what they installed."""

    RECORD = (
        "vllm/a.py,sha256=AAAA,10\nvllm/b.py,sha256=BBBB,10\nvllm/__pycache__/a.pyc,,\n"
        "../../../bin/vllm,sha256=CCCC,10\nvllm-0.32.0.dist-info/direct_url.json,sha256=DDDD,10\n"
    )

    def installed(self, folder: Path, record: str, name: str = "vllm-0.32.0") -> dict[str, str]:
        (folder / f"{name}.dist-info").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.dist-info/RECORD").write_text(record)
        return packages([folder])

    def test_what_an_installation_adds_has_no_part(self, tmp_path: Path) -> None:
        """Byte code, programs with the interpreter's path, and notes about the installation."""
        one = self.installed(tmp_path / "one", self.RECORD)
        lines = self.RECORD.splitlines()[:2][::-1]
        assert self.installed(tmp_path / "other", "\n".join(lines)) == one
        assert list(one) == ["vllm-0.32.0"]

    def test_a_changed_file_counts(self, tmp_path: Path) -> None:
        one = self.installed(tmp_path / "one", self.RECORD)
        changed = self.RECORD.replace("BBBB", "EEEE")
        assert self.installed(tmp_path / "other", changed) != one

    def test_others_do_not_count(self, tmp_path: Path) -> None:
        self.installed(tmp_path, "", "click-8.5.1")
        assert packages([tmp_path]) == {}

    def test_one_without_a_record(self, tmp_path: Path) -> None:
        (tmp_path / "torch-2.13.0.dist-info").mkdir()
        assert packages([tmp_path]) == {"torch-2.13.0": ""}
