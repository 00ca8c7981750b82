"""Which processors are on the NUMA node of a GPU? Memory of another node is slower to reach.

CUDA gives the device's address on the PCI bus, Linux the processors near that address
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
    """Those of the `allowed` processors that are on the NUMA node of `device`.

    All of them where the node is not known (a CPU, a machine with one node, a virtual machine that
    hides it) or where none of its processors is allowed: the choice of the user stands.
    """
    address = _pci_address(device)
    local = _local_processors(devices / address) if address is not None else frozenset()
    return frozenset(allowed) & local or frozenset(allowed)


def _pci_address(device: torch.device) -> str | None:
    """As in sysfs, "0000:dc:00.0"; by CUDA's numbers, which CUDA_VISIBLE_DEVICES changes."""
    if device.type != "cuda":
        return None
    try:
        found = torch.cuda.get_device_properties(device)
        domain, bus, slot = (getattr(found, f"pci_{n}_id") for n in ("domain", "bus", "device"))
    # A torch or a driver that does not tell; torch raises AssertionError where there is no CUDA.
    except (AssertionError, AttributeError, RuntimeError):
        return None
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def _local_processors(place: Path) -> frozenset[int]:
    """Empty where the kernel knows no node, in which case it lists all processors."""
    try:
        if int((place / "numa_node").read_text()) < 0:
            return frozenset()
        return _parsed((place / "local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


def _parsed(text: str) -> frozenset[int]:
    """The numbers in "0-31,64-95\\n". Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
