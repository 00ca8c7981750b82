"""How are tensors loaded into a vLLM model (by weight loaders or in place) and read from it?

Depends on torch's modules only; vLLM itself is not imported.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from tensorserve.bundle.layout import module_name
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import ITEM_SIZES, TensorRecord
from tensorserve.linux import populate

# Bytes in one system call. The kernel locks the process's memory map for its duration.
_POPULATE_BYTES = 8 * 1024**2
_OTHER_LAYOUT = "Leave --layout out: layout 'hf' fits every model."


def populate_soon(model: nn.Module, processors: frozenset[int]) -> threading.Thread:
    """Has the kernel allocate the pages of all parameters in host memory, in a thread.

    A new model's parameters have no pages yet. Otherwise the single thread of the weight loaders
    would wait for a page fault for every 4 KiB, while other processors are idle. The thread runs on
    `processors`.
    """
    memories = [
        plain_bytes(parameter)
        for parameter in model.parameters()
        if parameter.device.type == "cpu" and parameter.is_contiguous() and parameter.numel()
    ]

    def run() -> None:
        with suppress(OSError):  # vLLM binds its worker to one processor; this thread is not bound
            os.sched_setaffinity(0, processors)
        for memory in memories:
            for start in range(0, memory.numel(), _POPULATE_BYTES):
                populate(memory[start : start + _POPULATE_BYTES].numpy().data)

    thread = threading.Thread(target=run, name="tensorserve-populate", daemon=True)
    thread.start()
    return thread


def give(model: nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Loads a checkpoint's tensors with the model's load_weights(); returns the names it reports.

    Raises CorruptError, naming the tensor, if the model refuses a tensor or does not take all of
    them: the comparison with the manifest ends with the last tensor of the file.
    """
    last = "the first"

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for name, tensor in tensors:
            last = repr(name)
            yield name, tensor

    try:
        # Every vLLM model has load_weights(); torch's Module does not declare it.
        loaded: set[str] | None = model.load_weights(watched())  # type: ignore[operator]
    except (KeyError, ValueError, AssertionError) as error:
        raise unfit(model, f"it refused {last}", error) from error
    for name, _ in tensors:
        raise unfit(model, f"it took no more after {last}", ValueError(f"left: {name!r}"))
    return loaded


def unfit(model: nn.Module, what: str, error: Exception) -> CorruptError:
    """The error for tensors that do not fit the model class; `what` says which one, `error` why."""
    return CorruptError(
        f"The file's tensors are not those of vLLM's {type(model).__name__}: {what} "
        f"({str(error)[:500]}).",
        hint="Check that config.json and the .tensors file are of the same model. A file that was "
        "not made from a checkpoint may have other tensor names: pack the checkpoint with "
        "`tensorserve pack`.",
    )


def untie(model_config: Any) -> None:
    """Makes vLLM build an lm_head beside the embedding, even if config.json ties the two.

    For weights that have an lm_head. `model_config` is vLLM's ModelConfig.

    vLLM does so itself (0.32.0, ModelConfig.maybe_untie_word_embeddings) if it finds safetensors
    files with an lm_head beside config.json, and ties the two again after the load if they are
    equal. Directories with stand-ins (bundle/stand_ins.py) have such files, so that nothing is
    changed here. Without them (vLLM started on another directory, or a bundle of layout `vllm` of
    an earlier release), vLLM would silently omit a different lm_head.
    """
    config = model_config.hf_config
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        model_config.word_embeddings_untied_by_checkpoint = True


def homes(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a file in vLLM's layout may fill, by name: parameters and buffers.

    vLLM's writer also stores buffers that are in no state dict (tables of rotary embeddings).
    """
    return dict(model.named_buffers(remove_duplicate=False)) | model.state_dict(keep_vars=True)


def home(
    targets: dict[str, torch.Tensor], record: TensorRecord, device: torch.device
) -> torch.Tensor | None:
    """The memory (uint8) of a record's parameter, if the tensor can be read directly into it.

    None if the parameter is missing, not contiguous, of another shape or dtype, or not on
    `device`, the device that the stream writes to.
    """
    target = targets.get(module_name(record))
    if (
        target is None
        or target.device.type != device.type
        or not target.is_contiguous()
        or str(target.dtype) != f"torch.{record.dtype}"
        or tuple(target.shape) != record.shape
    ):
        return None  # copy_in_place reports a tensor that does not fit
    return plain_bytes(target)


def copy_in_place(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], *, once: bool = False
) -> None:
    """Copies a file in vLLM's own layout into the model's parameters and buffers.

    `once`: the file has one tensor for each memory, so that two tensors for the same memory are an
    error. Raises ConfigurationError if a name, shape or dtype does not fit, CorruptError if the
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
                    hint="The file was written in vLLM's own layout for another model, version, "
                    "dtype, quantization or parallel size. Pack the checkpoint with `tensorserve "
                    "pack`.",
                )
            if target.shape != tensor.shape or target.dtype != tensor.dtype:
                raise ConfigurationError(
                    f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the file and "
                    f"{tuple(target.shape)} {target.dtype} in this model.",
                    hint="A file in vLLM's own layout fits only the vLLM version, dtype, "
                    "quantization, parallel size and device (CPU or GPU) that wrote it.",
                )
            if once and target.numel() and target.data_ptr() in filled:
                raise ConfigurationError(
                    f"The file has a tensor of its own for {name!r}, which shares the memory of "
                    "another parameter in this model.",
                    hint="These parameters were not tied when the model was packed: check that "
                    "config.json is the bundle's.",
                )
            if target.data_ptr() != tensor.data_ptr():
                target.data.copy_(tensor)
            filled.add(target.data_ptr())
    # Tied parameters share memory, so that one of their names is enough. Buffers have a value when
    # the model is created (the scales of the KV cache have 1).
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and parameter.data_ptr() not in filled
    ]
    if left:
        raise CorruptError(
            f"The file lacks {len(left)} of the model's parameters, for example {left[0]!r}.",
            hint="Another version of vLLM may have written it. Pack the checkpoint again.",
        )


def computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers that are in no state dict, which vLLM computes (rotary tables)."""
    kept = model.state_dict(keep_vars=True)
    return {name: held.clone() for name, held in homes(model).items() if name not in kept}


def held_tensors(model: nn.Module, computed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that a file needs to fill such a model.

    These are the state dict, and the buffers of `computed` (from `computed_buffers`, before the
    load) that the checkpoint changed. Tied parameters appear once. Raises ConfigurationError for a
    tensor that a file cannot hold.
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
    """The tensor's bytes, in order (uint8, 1-D): a view if it is contiguous, else a copy."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
