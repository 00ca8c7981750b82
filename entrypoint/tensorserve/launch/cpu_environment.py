"""Which variables does vLLM's CPU build set for the processes that it spawns?

It sets them when it has read its configuration (vllm/platforms/cpu.py, check_and_update_config,
0.32.0). Processes that are forked from one that has imported vLLM need those that matter to a
library when it is loaded from the first `exec` on.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

# torch/_inductor/config.py reads it when it is imported; vllm/platforms/cpu.py:422 sets it.
_DYNAMIC_THREADS = {"TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
_OPENMP_LIBRARIES = ("libomp", "libgomp", "libiomp")
# platform.machine() of the architectures of vllm/platforms/cpu.py:449 and :492.
_ARM_X86_S390X = frozenset({"aarch64", "arm64", "x86_64", "amd64", "s390x"})
_WITH_POWER = _ARM_X86_S390X | {"ppc64le"}


def cpu_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What is added to `environ` for vLLM's CPU build on this machine."""
    added = dict(_DYNAMIC_THREADS)
    preload = _preload(environ.get("LD_PRELOAD", ""), platform.machine().lower())
    return added | {"LD_PRELOAD": preload} if preload else added


def _preload(given: str, machine: str) -> str:
    """LD_PRELOAD as vllm/platforms/cpu.py:442-510 makes it of `given`."""
    preload = given
    if machine in _WITH_POWER and not any(name in preload for name in _OPENMP_LIBRARIES):
        torch = _folder("torch")
        libraries = [torch.parent / "torch.libs", torch / "lib"] if torch is not None else []
        found = [path for folder in libraries for path in folder.glob("libgomp*.so*")]
        if found:
            preload = f"{preload}:{found[0]}" if preload else str(found[0])
    if machine in _ARM_X86_S390X and "libtcmalloc" not in preload:
        vllm = _folder("vllm")
        folder = None if vllm is None else vllm / "libs"
        for pattern in ("libtcmalloc_minimal*.so*", "libtcmalloc.so*"):
            found = [] if folder is None else list(folder.glob(pattern))
            if found:
                return f"{found[0]}:{preload}" if preload else str(found[0])
    return preload


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
