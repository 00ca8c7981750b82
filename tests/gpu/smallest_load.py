"""The smallest load, for compute-sanitizer: python smallest_load.py FILE DEVICE"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu_files import smallest
from gpu_loads import loaded


def main(path: str, device: str) -> int:
    """0 where all is on the device as it was written."""
    found = loaded(Path(path), torch.device(device), ring=0, connections=3)
    wanted = smallest()
    # Compared on the CPU: the kernels of torch are not what is looked at.
    equal = found.keys() == wanted.keys() and all(
        torch.equal(found[name].cpu(), wanted[name]) for name in wanted
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
