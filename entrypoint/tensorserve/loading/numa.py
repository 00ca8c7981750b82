"""Which processors are near a GPU? Those of its NUMA node: memory beyond it is slower to reach.

What CUDA says of a device's place on the PCI bus, and what Linux knows of that place
(/sys/bus/pci/devices, Documentation/ABI/testing/sysfs-bus-pci). Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

_DEVICES = Path("/sys/bus/pci/devices")


def near(
    device: torch.device, allowed: Collection[int], devices: Path = _DEVICES
) -> frozenset[int]:
    """Those of the `allowed` processors that are on the node of `device`.

    All of them where nothing is known (no such device, a single node, a virtual machine that hides
    it) or where none of the node's is allowed: whoever chose them knows better.
    """
    address = _pci_address(device)
    local = _local_processors(devices / address) if address is not None else frozenset()
    return frozenset(allowed) & local or frozenset(allowed)


def _pci_address(device: torch.device) -> str | None:
    """As in sysfs, "0000:dc:00.0". By CUDA's own numbers: CUDA_VISIBLE_DEVICES moves them."""
    if device.type != "cuda":
        return None
    try:
        found = torch.cuda.get_device_properties(device)
        domain, bus, slot = (getattr(found, f"pci_{n}_id") for n in ("domain", "bus", "device"))
    # A build of torch or a driver without it; torch raises AssertionError where there is no CUDA.
    except (AssertionError, AttributeError, RuntimeError):
        return None
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def _local_processors(place: Path) -> frozenset[int]:
    """Empty where the kernel knows no node: then all processors are listed there."""
    try:
        if int((place / "numa_node").read_text()) < 0:
            return frozenset()
        return _parsed((place / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def _parsed(text: str) -> frozenset[int]:
    """Of "0-31,64-95\\n". Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
