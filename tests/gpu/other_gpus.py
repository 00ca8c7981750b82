"""A load onto the last GPU, and on which others it made a context: python other_gpus.py FILE...

A context takes some 0.5 GB of a GPU; a rank of tensor parallelism wants one on its own only.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch
from gpu_loads import loaded


def main(paths: list[str]) -> None:
    """Print their numbers, a JSON list."""
    count = torch.cuda.device_count()
    last = torch.device("cuda", count - 1)
    torch.cuda.set_device(last)
    for path in paths:
        for options in ({}, {"hashes": True}, {"loader": "reference"}):
            loaded(Path(path), last, **options)
    torch.cuda.synchronize(last)
    print(json.dumps([number for number in range(count - 1) if _has_context(number)]))


def _has_context(number: int) -> bool:
    """cuDevicePrimaryCtxGetState: the driver's own answer, which makes no context."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDevicePrimaryCtxGetState(
        device, ctypes.byref(flags), ctypes.byref(active)
    ):
        raise RuntimeError("the driver does not say which contexts there are")
    return bool(active.value)


if __name__ == "__main__":
    main(sys.argv[1:])
