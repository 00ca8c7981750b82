"""Quantized checkpoints of the matrix, as the tools that make them write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matrix_models import causal, edit
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
GROUP = 32
# The place of each of eight values in AWQ's int32 (AutoAWQ's gemm layout).
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Matrix = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
"""(name without "weight", matrix out × in) → what is stored instead."""


def gptq(directory: Path, tokenizer: Path, *, partial: bool = False) -> Path:
    """GPTQ, 4 bit, symmetric, as GPTQModel writes it. `partial`: down_proj stays as it was, and
    config.json does not say so.
    """

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        grouped = weight.float().T.reshape(-1, GROUP, weight.shape[0])
        scale = grouped.abs().amax(1) / 7
        values = ((grouped / scale[:, None]).round() + 8).clamp(0, 15).reshape(-1, weight.shape[0])
        rows = torch.arange(weight.shape[1], dtype=torch.int32)
        return {
            f"{base}qweight": _packed(values.T).T,
            f"{base}qzeros": _packed(torch.full_like(scale, 7)),
            f"{base}scales": scale.half(),
            f"{base}g_idx": rows // GROUP,
        }

    _llama(directory, tokenizer, torch.float16, matrix, "down_proj" if partial else "")
    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    quantization = settings | {"quant_method": "gptq", "checkpoint_format": "gptq"}
    return edit(directory, quantization_config=quantization)


def awq(directory: Path, tokenizer: Path, *, partial: bool = False) -> Path:
    """AWQ, 4 bit with zero points, as AutoAWQ writes it. `partial`: as for `gptq`."""

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        grouped = weight.float().T.reshape(-1, GROUP, weight.shape[0])
        low, high = grouped.amin(1), grouped.amax(1)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        values = ((grouped / scale[:, None]).round() + zero[:, None]).clamp(0, 15)
        return {
            f"{base}qweight": _packed(values.reshape(-1, weight.shape[0]), _AWQ_ORDER),
            f"{base}qzeros": _packed(zero, _AWQ_ORDER),
            f"{base}scales": scale.half(),
        }

    _llama(directory, tokenizer, torch.float16, matrix, "down_proj" if partial else "")
    settings = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    quantization = settings | {"quant_method": "awq", "modules_to_not_convert": None}
    return edit(directory, quantization_config=quantization)


def int8(directory: Path, tokenizer: Path) -> Path:
    """compressed-tensors, W8A8: int8 with a scale for each row, activations as they come."""

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        values = (weight.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return {f"{base}weight": values, f"{base}weight_scale": scale.to(torch.bfloat16)}

    _llama(directory, tokenizer, torch.bfloat16, matrix)
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    return _compressed(
        directory,
        "int-quantized",
        weights=eight | {"strategy": "channel", "dynamic": False},
        input_activations=eight | {"strategy": "token", "dynamic": True},
    )


def int4(directory: Path, tokenizer: Path) -> Path:
    """compressed-tensors, W4A16: eight values an int32, a scale for each group."""

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        grouped = weight.float().reshape(weight.shape[0], -1, GROUP)
        scale = grouped.abs().amax(2) / 7
        values = ((grouped / scale[:, :, None]).round() + 8).clamp(0, 15).reshape(weight.shape)
        return {
            f"{base}weight_packed": _packed(values),
            f"{base}weight_scale": scale.to(torch.bfloat16),
            f"{base}weight_shape": torch.tensor(weight.shape),
        }

    _llama(directory, tokenizer, torch.bfloat16, matrix)
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return _compressed(directory, "pack-quantized", weights=four | {"group_size": GROUP})


def fp8(directory: Path, tokenizer: Path) -> Path:
    """FP8 in blocks of 128 × 128, as DeepSeek-V3 and Qwen3 publish it."""

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        out, into = weight.shape
        blocks = weight.float().reshape(max(1, out // 128), -1, max(1, into // 128), min(128, into))
        scale = blocks.abs().amax((1, 3)) / 448
        values = blocks / scale[:, None, :, None]
        return {
            f"{base}weight": values.reshape(weight.shape).to(torch.float8_e4m3fn),
            f"{base}weight_scale_inv": scale,
        }

    _llama(directory, tokenizer, torch.bfloat16, matrix, num_key_value_heads=4)
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return edit(directory, quantization_config=settings | {"quant_method": "fp8"})


def fp8_compressed(directory: Path, tokenizer: Path) -> Path:
    """compressed-tensors, FP8: a scale for each row, activations as they come."""

    def matrix(base: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        values = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {f"{base}weight": values, f"{base}weight_scale": scale.to(torch.bfloat16)}

    _llama(directory, tokenizer, torch.bfloat16, matrix)
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    return _compressed(
        directory,
        "float-quantized",
        weights=eight | {"strategy": "channel", "dynamic": False},
        input_activations=eight | {"strategy": "token", "dynamic": True},
    )


def _llama(
    directory: Path,
    tokenizer: Path,
    dtype: torch.dtype,
    matrix: Matrix,
    kept: str = "",
    **settings: Any,
) -> None:
    causal("Llama", dtype, **settings)(directory, tokenizer)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        if name.endswith("_proj.weight") and not (kept and kept in name):
            stored |= matrix(name.removesuffix("weight"), tensor)
        else:
            stored[name] = tensor
    found = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(found, directory / WEIGHTS, {"format": "pt"})


def _compressed(directory: Path, form: str, **group: Any) -> Path:
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"]} | group},
        "ignore": ["lm_head"],
    }
    return edit(directory, quantization_config=quantization)


def _packed(values: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """Rows of whole numbers from 0 to 15, eight in an int32."""
    eights = values.reshape(values.shape[0], -1, 8)[:, :, order or list(range(8))].to(torch.int64)
    whole = sum(eights[:, :, place] << (4 * place) for place in range(8))
    assert isinstance(whole, torch.Tensor)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)
