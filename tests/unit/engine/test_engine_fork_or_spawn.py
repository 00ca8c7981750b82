"""When a process is spawned although a fork server is there."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import spawn
from types import SimpleNamespace

import pytest

from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.engine.fork_or_spawn import (
    READ_AT_USE,
    open_files,
    why_no_server,
    why_spawn,
)

SERVER = {"PATH": "/bin", "HOME": "/root"}


@pytest.mark.parametrize(
    ("server", "caller"),
    [
        pytest.param({}, {}, id="the same"),
        pytest.param({}, dict.fromkeys(READ_AT_USE, "1"), id="read at use"),
        pytest.param({}, {HANDOFF_VARIABLE: "/proc/1/fd/3"}, id="our own"),
        pytest.param({}, {"OMP_NUM_THREADS": "3"}, id="number of threads"),
        pytest.param({}, {"GOMP_CPU_AFFINITY": "0 2 4"}, id="processors"),
    ],
)
def test_forked(server: dict[str, str], caller: dict[str, str]) -> None:
    """Nothing that differs was read by an import, or it can be applied later."""
    assert why_spawn(SERVER | server, SERVER | caller) is None


@pytest.mark.parametrize(
    ("cuda", "variable", "forked"),
    [
        (None, "FLASHINFER_WORKSPACE_BASE", True),
        ("13.0", "FLASHINFER_WORKSPACE_BASE", False),
        ("13.0", "VLLM_CACHE_ROOT", True),
        (None, "NUMBA_CACHE_DIR", False),
    ],
)
def test_sealed_caches_are_found_by_forked_processes(
    cuda: str | None, variable: str, forked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks move them when vLLM has been imported; a CUDA library may have read its own."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda)))
    assert (why_spawn(SERVER, SERVER | {variable: "/x"}) is None) == forked


@pytest.mark.parametrize(
    ("server", "caller", "name"),
    [
        pytest.param({}, {"TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}, "TORCH", id="torch reads it"),
        pytest.param({}, {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, "BREAKABLE", id="vLLM reads it"),
        pytest.param({}, {"LD_PRELOAD": "/x.so"}, "LD_PRELOAD", id="the linker reads it"),
        pytest.param({}, {"KMP_AFFINITY": "x"}, "KMP_AFFINITY", id="Intel's OpenMP"),
        pytest.param({"ANY": "1"}, {"ANY": "2"}, "ANY", id="another value"),
        pytest.param({"ANY": "1"}, {}, "ANY", id="gone"),
        pytest.param({}, {"OMP_NUM_THREADS": "2,3"}, "OMP_NUM_THREADS", id="nested numbers"),
        pytest.param({"OMP_NUM_THREADS": "2"}, {}, "OMP_NUM_THREADS", id="no number any more"),
        pytest.param(
            {"OMP_PLACES": "{0}"}, {"OMP_PLACES": "{0}", "GOMP_CPU_AFFINITY": "1"}, "GOMP",
            id="libgomp has bound its threads already",
        ),
    ],
)  # fmt: skip
def test_spawned(server: dict[str, str], caller: dict[str, str], name: str) -> None:
    """The reason names the variable, and no value: that could be a secret."""
    reason = why_spawn(SERVER | server, SERVER | caller)
    assert reason is not None
    assert reason.startswith("set since the import: ")
    assert name in reason
    assert "/x.so" not in reason


def test_another_executable_is_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's --numa-bind has a script run instead of Python."""
    monkeypatch.setattr(spawn, "_python_exe", b"/tmp/numactl-wrapper")
    assert "numa-bind" in (why_spawn(SERVER, SERVER) or "")


def test_a_process_with_an_open_device_is_no_server() -> None:
    """Its driver's state would be shared."""
    assert "/dev/nvidiactl" in (why_no_server([], ["/tmp/x", "/dev/nvidiactl"]) or "")
    assert why_no_server([], ["/dev/null", "socket:[1]"]) is None


def test_a_process_with_other_threads_is_no_server() -> None:
    """They are named."""
    assert "pump" in (why_no_server(["pump"], []) or "")


def test_an_initialised_device_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA cannot be used in a child that was forked after that."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert why_no_server([], []) == "a device is initialised"


def test_open_files_are_named_as_the_kernel_does() -> None:
    """A path, for a file that was opened by one."""
    with open(os.devnull):
        assert os.devnull in open_files()


def test_other_threads_are_found_but_those_of_openblas() -> None:
    """In a process of its own: numpy's OpenBLAS has threads, which end before a fork."""
    program = (
        "import threading, numpy\n"
        "from tensorserve.engine.fork_or_spawn import other_threads\n"
        "print(len(other_threads()))\n"
        "wait = threading.Event()\n"
        "threading.Thread(target=wait.wait, daemon=True).start()\n"
        "print(len(other_threads()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ) | {"OPENBLAS_NUM_THREADS": "3"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert done.stdout.split() == ["0", "1"]
