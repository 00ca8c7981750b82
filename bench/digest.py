"""How are the tensors of two contestants compared bit for bit? By one digest over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

_PIECE = 64 * 1024**2


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE3 (hex) over name, dtype, shape and bytes of all tensors, in the order of their names.

    Not SHA-256: BLAKE3 uses all cores, and every measured load is checked in full.
    """
    from blake3 import blake3  # not on every machine that gpu.py runs on

    total = blake3(max_threads=blake3.AUTO)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(total.hexdigest())


def checksum(tensors: Mapping[str, torch.Tensor], device: str | None = None) -> str:
    """A digest that is computed on the tensors' own device, or on `device`.

    A sum (mod 2^64) of their 32-bit words, each times an odd number of its own, so that a changed
    or moved word shows. Not cryptographic.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor if device is None else tensor.to(device)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), _PIECE):
            piece = flat[start : start + _PIECE]
            words = len(piece) // 4 * 4
            total.update(_weighted(piece[:words].clone().view(torch.int32)))
            total.update(_weighted(piece[words:]))
    return total.hexdigest()


def _weighted(values: torch.Tensor) -> bytes:
    weights = torch.arange(len(values), device=values.device, dtype=torch.int64) * 2 + 1
    return int((values.to(torch.int64) * weights).sum()).to_bytes(8, "little", signed=True)


def data_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
