"""Which GPU, driver and bus is this, and which processors are on the GPU's NUMA node?"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

_NODES = Path("/sys/devices/system/node")


def device_facts(device: str) -> dict[str, Any]:
    """For a result: name, driver, CUDA, memory in bytes, PCIe, NUMA; of "cpu" only a name."""
    if device == "cpu":
        return {"name": "the CPU (only to try this script)"}
    import torch

    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "driver": _driver(),
        "driver_cuda": _driver_cuda(),
        "torch_cuda": torch.version.cuda,
        **_link(device),
    }


def processors_by_node() -> dict[int, list[int]]:
    """{NUMA node: its processors that this process may use}."""
    here = os.sched_getaffinity(0)
    found: dict[int, list[int]] = {}
    for node in sorted(_NODES.glob("node[0-9]*")):
        with suppress(OSError):
            mine = sorted(_cpu_list((node / "cpulist").read_text()) & here)
            if mine:
                found[int(node.name.removeprefix("node"))] = mine
    return found or {0: sorted(here)}


def _cpu_list(text: str) -> set[int]:
    """Of the kernel's "0-3,8": cpuset(7)."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _driver() -> str | None:
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        if found:
            return found[1]
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return _text(pynvml.nvmlSystemGetDriverVersion())
    return None


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver carries: cuDriverGetVersion."""
    with suppress(OSError):
        number = ctypes.c_int()
        if not ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return f"{number.value // 1000}.{number.value % 1000 // 10}"
    return None


def _link(device: str) -> dict[str, Any]:
    """PCIe generation and lanes, NUMA node; without values that NVML lacks (MIG, sandboxes)."""
    import torch

    found: dict[str, Any] = {}
    try:
        import pynvml
    except ImportError:
        return found
    # FileNotFoundError, ValueError: sysfs has no such GPU, as in a sandbox.
    with suppress(pynvml.NVMLError, OSError, ValueError):
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        found["pcie_generation"] = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        found["pcie_lanes"] = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        bus = _text(pynvml.nvmlDeviceGetPciInfo(handle).busId).lower()
        # NVML writes the domain with eight digits, sysfs with four.
        path = Path("/sys/bus/pci/devices") / bus[-12:] / "numa_node"
        found["numa_node"] = int(path.read_text())
    return found


def _text(said: str | bytes) -> str:
    """Older bindings of NVML return bytes."""
    return said.decode() if isinstance(said, bytes) else said
