"""Is there a device for each rank on this machine, with a driver that carries vLLM's CUDA?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tensorserve.config.ranks import Ranks
from tensorserve.errors import ConfigurationError
from tensorserve.launch.gpus import Gpus, read_gpus
from tensorserve.launch.preflight.results import Passed
from tensorserve.launch.preflight.vllm_build import built_for_cuda, engine_is_cpu
from tensorserve.telemetry import Check

# The first driver with each CUDA: docs.nvidia.com/deploy/cuda-compatibility.
_DRIVERS = {12: "R525", 13: "R580"}


def visible_gpus(environ: Mapping[str, str]) -> Gpus | None:
    """The GPUs that an engine with `environ` will see; None on the CPU build, or without NVML.

    Raises ConfigurationError where there is none, or its driver's library cannot be used.
    """
    if engine_is_cpu():
        return None
    there = any(re.fullmatch(r"nvidia\d+", path.name) for path in Path("/dev").glob("nvidia*"))
    # Windows' Linux subsystem shows its GPUs through one device of another name.
    if not there and not Path("/dev/dxg").exists():
        raise ConfigurationError(
            "No GPU is visible, and the installed vLLM is the CUDA build.",
            hint="Start the container with `--gpus all` (NVIDIA's container toolkit on the host), "
            "or use the cpu image.",
        )
    return read_gpus(environ.get("CUDA_VISIBLE_DEVICES"))


def check_device(gpus: Gpus | None, ranks: Ranks) -> Passed:
    """There is a device for each rank on this machine, with a driver that carries vLLM's CUDA."""
    if engine_is_cpu():
        return Passed(Check.DEVICE, f"CPU, {len(os.sched_getaffinity(0))} cores")
    if gpus is None:
        return Passed(Check.DEVICE, "GPU; NVML is not here to say which")
    _check_driver(gpus)
    seen = len(gpus.visible)
    # Ray may put them all elsewhere.
    wanted = 0 if ranks.here is None else ranks.here
    if seen < wanted:
        hidden = gpus.present > seen
        raise ConfigurationError(
            f"{wanted} {'rank is' if wanted == 1 else 'ranks are'} to run on this machine, and "
            f"{_of_gpus(seen)} visible"
            + (f" ({gpus.present} without CUDA_VISIBLE_DEVICES)." if hidden else "."),
            hint="Each rank takes a GPU. Give the container more of them (`--gpus`, "
            "CUDA_VISIBLE_DEVICES), or set TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE and the other "
            "parallel sizes lower.",
        )
    used = ", ".join([f"{wanted} of {seen} GPUs", *(gpu.name for gpu in gpus.visible[:1])])
    return Passed(Check.DEVICE, used + (f", driver {gpus.driver}" if gpus.driver else ""))


def _check_driver(gpus: Gpus) -> None:
    needed = built_for_cuda()
    if gpus.cuda is not None and gpus.cuda < needed * 1000:
        carried = f"{gpus.cuda // 1000}.{gpus.cuda % 1000 // 10}"
        raise ConfigurationError(
            f"The NVIDIA driver {gpus.driver or ''} carries CUDA {carried}; the installed vLLM "
            f"needs CUDA {needed}.".replace("  ", " "),
            hint=f"Install driver {_DRIVERS.get(needed, 'of a later release')} or later on the "
            "host, and restart it. `nvidia-smi` shows the driver and its CUDA.",
        )


def _of_gpus(count: int) -> str:
    return "1 GPU is" if count == 1 else f"{count} GPUs are"
