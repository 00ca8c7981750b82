"""How do tensors get into a model of vLLM, through its weight loaders or in place, and out of it?

Knows torch's modules only; vLLM itself is not imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import ITEM_SIZES, TensorRecord
from tensorserve.layouts import module_name
from tensorserve.linux import populate

# Bytes; the kernel holds off others who change the process's memory for so long.
_AT_ONCE = 8 * 1024**2
_OTHER_LAYOUT = "Leave --layout out: layout 'hf' fits every model."


def populate_soon(model: nn.Module, processors: frozenset[int]) -> threading.Thread:
    """Have the kernel find the pages of all parameters in host memory, in a thread of its own.

    A new model's parameters have none yet. Weight loaders that copy into them would otherwise wait
    for a page fault every 4 KiB, in the one thread that they run in, while processors are idle.
    """
    memories = [
        plain_bytes(parameter)
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

    Raises CorruptError, naming the tensor, where the model refuses one or does not ask for it: a
    file is compared with its manifest as a whole, when its last tensor is taken.
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
    for name, _ in tensors:
        raise unfit(model, f"it asked for no more after {last}", ValueError(f"left: {name!r}"))
    return loaded


def unfit(model: nn.Module, what: str, error: Exception) -> CorruptError:
    """The error for a checkpoint whose tensors are not those of the model in config.json."""
    return CorruptError(
        f"The file's tensors are not those of vLLM's {type(model).__name__}: {what} "
        f"({str(error)[:500]}).",
        hint="Do config.json and the .tensors file belong together? A file that was not made from "
        "a checkpoint may name its tensors otherwise: pack the checkpoint with `tensorserve pack`.",
    )


def untie(model_config: Any) -> None:
    """Have vLLM build a head beside the embedding, for weights that have one, whatever config.json
    says of tying. `model_config`: vLLM's ModelConfig.

    vLLM does so itself (0.32.0, ModelConfig.maybe_untie_word_embeddings) where it sees safetensors
    files with a head beside config.json, and ties the two again after the load if they are equal.
    Our weights are not there: a head that differs would be left out in silence.
    """
    config = model_config.hf_config
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        model_config.word_embeddings_untied_by_checkpoint = True


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
    return plain_bytes(target)


def copy_in_place(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, once: bool = False
) -> None:
    """Copy a file in vLLM's own layout over the model's parameters and buffers.

    `once`: the file has one tensor for each memory, so that a second one for the same is another
    model's. Raises ConfigurationError where a name, shape or dtype does not fit, CorruptError
    where the file lacks a parameter.
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
            if once and target.numel() and target.data_ptr() in filled:
                raise ConfigurationError(
                    f"The file holds {name!r} for itself; in this model it is another's memory.",
                    hint="Parameters are tied here that were not when the model was packed: is "
                    "config.json the one of the bundle?",
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


def computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers that are in no state dict: vLLM computes them (rotary tables)."""
    kept = model.state_dict(keep_vars=True)
    return {name: held.clone() for name, held in homes(model).items() if name not in kept}


def held_tensors(model: nn.Module, computed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a file has to hold to fill such a model: the state dict, and of `computed` (what
    `computed_buffers` gave before the load) the buffers that the checkpoint changed.

    Tied parameters come once. Raises ConfigurationError for what a file cannot hold.
    """
    held: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in homes(model).items():
        before = computed.get(name)
        if before is not None and torch.equal(before, tensor):
            continue
        tensor = tensor.data
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            raise ConfigurationError(
                f"vLLM holds {name!r} as a {type(tensor).__name__} on {tensor.device}, which a "
                ".tensors file cannot hold.",
                hint=_OTHER_LAYOUT,
            )
        if str(tensor.dtype).removeprefix("torch.") not in ITEM_SIZES:
            raise ConfigurationError(
                f"vLLM holds {name!r} as {tensor.dtype}, which a .tensors file cannot hold.",
                hint=_OTHER_LAYOUT,
            )
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        held[name] = tensor
    return held


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, in order: its own memory where that is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
