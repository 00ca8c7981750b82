"""A bundle as tensorizer's users make it: its own writer, and the small files beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorizer import EncryptionParams, TensorSerializer


def write_bundle(
    content: torch.nn.Module | dict[str, torch.Tensor],
    model: Path,
    bundle: Path,
    encryption: EncryptionParams | None = None,
) -> Path:
    """`write_module` or `write_state_dict`, as fits `content`; small files from `model`."""
    bundle.mkdir()
    serializer = TensorSerializer(str(bundle / "model.tensors"), encryption=encryption)
    if isinstance(content, torch.nn.Module):
        serializer.write_module(content)
    else:
        serializer.write_state_dict(content)
    serializer.close()
    return add_small_files(model, bundle)


def add_small_files(model: Path, bundle: Path) -> Path:
    """Everything of `model` but its weights, into `bundle`."""
    for path in model.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = bundle / path.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return bundle
