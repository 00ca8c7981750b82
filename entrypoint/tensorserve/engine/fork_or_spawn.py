"""Is a process of vLLM forked from the one that has imported, or spawned? And if so, why?

A forked process has the modules and libraries of the fork server. It is as good as a spawned one
only where they would be the same in it. So it is spawned where the fork server has something that
does not survive a fork, and where a variable differs that may have been read by an import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from multiprocessing import spawn
from pathlib import Path

from tensorserve.config import compile_caches
from tensorserve.config.variables import HANDOFF_VARIABLE

# Variables that may differ: vLLM sets them while it runs, and they are read at use, not by an
# import. Places in vLLM 0.32.0. Any other one that differs might be read by an import:
# TORCHINDUCTOR_CPP_DYNAMIC_THREADS (torch/_inductor/config.py:1685; launch/cpu_environment.py sets
# it before the import), VLLM_USE_BREAKABLE_CUDAGRAPH (vllm/config/vllm.py:817 sets it, and
# v1/executor/ray_env_utils.py:7 says that it has to be set before imports),
# PROMETHEUS_MULTIPROC_DIR (v1/metrics/prometheus.py:26; prometheus_client/values.py chooses its
# class by it), KMP_AFFINITY (utils/ompmultiprocessing.py:82; read when the library is loaded).
READ_AT_USE = frozenset(
    {
        "VLLM_WORKER_MULTIPROC_METHOD",  # platforms/cpu.py:409, serve/utils/api_utils.py:166
        "NUMEXPR_MAX_THREADS",  # platforms/cpu.py:413; a limit that only raises an error
        "TORCHINDUCTOR_COMPILE_THREADS",  # platforms/cpu.py:416; 1 by env_override.py:168 already
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",  # platforms/cpu.py:419, read through vllm/envs.py
        "VLLM_SSM_CONV_STATE_LAYOUT",  # platforms/cpu.py:438, read through vllm/envs.py
        "LOCAL_WORLD_SIZE",  # platforms/cpu.py:512
        "VLLM_OMP_NUM_THREADS_SET_BY_VLLM",  # multiproc_executor.py:1122
        "VLLM_DIST_IDENT",  # v1/worker/cpu_worker.py:148
        "AITER_SITUV2_A4W4",  # _aiter_ops.py:1920, when it is imported; for AMD's GPUs
        "AITER_SITUV2_A8W4",  # the same
        HANDOFF_VARIABLE,
    }
)
# Applied to a library that is loaded already (engine/forked_state.py).
APPLIED = frozenset({"OMP_NUM_THREADS", "GOMP_CPU_AFFINITY"})
# With any of them libgomp has bound its threads itself when it was loaded.
_BINDING = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
# Device files whose state is shared with a child that is forked, and is wrong there.
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/accel")


def differing(server: Mapping[str, str], caller: Mapping[str, str]) -> list[str]:
    """Names of variables that forbid a fork: different, and maybe read by an import."""
    names = {name for name in server.keys() | caller.keys() if server.get(name) != caller.get(name)}
    names -= READ_AT_USE | _movable_caches()
    return sorted(name for name in names if not _can_apply(name, server, caller))


def _movable_caches() -> frozenset[str]:
    """Variables of caches that may differ. torch's CPU build imports none of CUDA's libraries."""
    torch = sys.modules.get("torch")
    with_cuda = torch is not None and torch.version.cuda is not None
    return compile_caches.READ_AT_USE if with_cuda else compile_caches.MOVED


def _can_apply(name: str, server: Mapping[str, str], caller: Mapping[str, str]) -> bool:
    words = caller.get(name, "").split()
    if name not in APPLIED or not words or not all(word.isdecimal() for word in words):
        return False
    return name == "OMP_NUM_THREADS" or not any(one in server for one in _BINDING)


def why_spawn(server: Mapping[str, str], caller: Mapping[str, str]) -> str | None:
    """Why a caller with these variables has to spawn; None: it may fork.

    `server`: the variables with which the fork server has imported.
    """
    if os.fsdecode(spawn.get_executable()) != sys.executable:
        return "another program is run for it (--numa-bind)"
    names = differing(server, caller)
    return f"set since the import: {', '.join(names)}" if names else None


def why_no_server(tasks: Iterable[str], files: Iterable[str]) -> str | None:
    """Why this process cannot be the fork server; None: it can.

    `tasks`: the names of its other threads; `files`: what its descriptors are open for.
    """
    others = sorted(tasks)
    if others:
        return f"threads that a fork would not copy: {', '.join(others)}"
    devices = sorted({file for file in files if file.startswith(_DEVICES)})
    if devices:
        return f"open devices: {', '.join(devices)}"
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_initialized() or torch.xpu.is_initialized()):
        return "a device is initialised"
    return None


def other_threads() -> list[str]:
    """Names of this process's threads besides the calling main thread.

    OpenBLAS ends its threads before a fork, and starts them again when they are needed
    (driver/others/memory.c, openblas_fork_handler). So one is forked first.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    found = []
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != os.getpid():
            try:
                found.append((task / "comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
    return found


def open_files() -> list[str]:
    """What this process's descriptors are open for, as the kernel names it."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except FileNotFoundError:
            continue  # the descriptor that lists them
    return found
