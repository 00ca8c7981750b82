"""How do tensors get into a model of vLLM: through its weight loaders, or in place?"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import nn

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import TensorRecord
from tensorserve.layouts import module_name
from tensorserve.linux import populate

# Bytes; the kernel holds off others who change the process's memory for so long.
_AT_ONCE = 8 * 1024**2


def populate_soon(model: nn.Module, processors: frozenset[int]) -> threading.Thread:
    """Have the kernel find the pages of all parameters in host memory, in a thread of its own.

    A new model's parameters have none yet. Weight loaders that copy into them would otherwise wait
    for a page fault every 4 KiB, in the one thread that they run in, while processors are idle.
    """
    memories = [
        parameter.data.view(-1).view(torch.uint8)
        for parameter in model.parameters()
        if parameter.device.type == "cpu" and parameter.is_contiguous() and parameter.numel()
    ]

    def run() -> None:
        with suppress(OSError):  # vLLM binds its worker to one processor
            os.sched_setaffinity(0, processors)
        for memory in memories:
            for start in range(0, memory.numel(), _AT_ONCE):
                populate(memory[start : start + _AT_ONCE].numpy().data)

    thread = threading.Thread(target=run, name="tensorserve-populate", daemon=True)
    thread.start()
    return thread


def give(model: nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Hand a checkpoint's tensors to vLLM's own weight loaders; gives what they say they loaded.

    Raises CorruptError, naming the tensor, where the model refuses one.
    """
    last = "the first"

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for name, tensor in tensors:
            last = repr(name)
            yield name, tensor

    try:
        # Every vLLM model has it; torch's Module does not know.
        loaded: set[str] | None = model.load_weights(watched())  # type: ignore[operator]
    except (KeyError, ValueError, AssertionError) as error:
        raise unfit(model, f"it refused {last}", error) from error
    return loaded


def unfit(model: nn.Module, what: str, error: Exception) -> CorruptError:
    """The error for a checkpoint whose tensors are not those of the model in config.json."""
    return CorruptError(
        f"The file's tensors are not those of vLLM's {type(model).__name__}: {what} "
        f"({str(error)[:500]}).",
        hint="Do config.json and the .tensors file belong together? A file that was not made from "
        "a checkpoint may name its tensors otherwise: pack the checkpoint with `tensorserve pack`.",
    )


def homes(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a file in vLLM's layout may fill, by name: parameters and buffers.

    vLLM's writer stores buffers too that are in no state dict (tables of rotary embeddings).
    """
    return dict(model.named_buffers(remove_duplicate=False)) | model.state_dict(keep_vars=True)


def home(
    targets: dict[str, torch.Tensor], record: TensorRecord, device: torch.device
) -> torch.Tensor | None:
    """The parameter's own memory (uint8), where a tensor can be read straight into it.

    `device`: where the stream can write.
    """
    target = targets.get(module_name(record))
    if (
        target is None
        or target.device.type != device.type
        or not target.is_contiguous()
        or str(target.dtype) != f"torch.{record.dtype}"
        or tuple(target.shape) != record.shape
    ):
        return None  # what does not fit is said where it is copied
    return target.data.view(-1).view(torch.uint8)


def copy_in_place(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a file in vLLM's own layout over the model's parameters and buffers.

    Raises ConfigurationError where a name, shape or dtype does not fit, CorruptError where the
    file lacks a parameter.
    """
    targets = homes(model)
    filled: set[int] = set()
    with torch.no_grad():
        for name, tensor in tensors:
            target = targets.get(name)
            if target is None:
                raise ConfigurationError(
                    f"The file holds {name!r}, which this model does not have.",
                    hint="It was written in vLLM's own layout for another model, version, dtype, "
                    "quantization or parallel size. Pack the checkpoint with `tensorserve pack`.",
                )
            if target.shape != tensor.shape or target.dtype != tensor.dtype:
                raise ConfigurationError(
                    f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the file and "
                    f"{tuple(target.shape)} {target.dtype} in this model.",
                    hint="A file in vLLM's own layout fits only the vLLM version, dtype, "
                    "quantization and parallel size (and CPU or GPU) that wrote it.",
                )
            if target.data_ptr() != tensor.data_ptr():
                target.data.copy_(tensor)
            filled.add(target.data_ptr())
    # Tied parameters share memory: one of their names is enough. Buffers are born with a value
    # (the scales of the KV cache with 1).
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and parameter.data_ptr() not in filled
    ]
    if left:
        raise CorruptError(
            f"The file lacks {len(left)} of the model's parameters, for example {left[0]!r}.",
            hint="Was it written by another version of vLLM? Pack the checkpoint again.",
        )
