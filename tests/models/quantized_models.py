"""Tiny checkpoints of each quantization: Llamas (and a mixture of experts) made smaller here.

The values matter little: what is compared is what vLLM takes from the same directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
# AWQ's order of the eight 4-bit values in an int32.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def gptq(directory: Path, tokenizer: Path) -> Path:
    """GPTQ, 4 bits, symmetric, groups of 32 inputs."""

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        turned = weight.float().T  # inputs, outputs
        inputs, outputs = turned.shape
        scale = turned.reshape(-1, GROUP, outputs).abs().amax(1) / 7
        values = (turned / scale.repeat_interleave(GROUP, 0)).round() + 8
        return {
            f"{base}.qweight": _eight_in_one(values.T.reshape(outputs, -1, 8)).T.contiguous(),
            f"{base}.qzeros": _eight_in_one(torch.full((inputs // GROUP, outputs // 8, 8), 7.0)),
            f"{base}.scales": scale.half(),
            f"{base}.g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    return _llama(directory, tokenizer, layer, settings | {"quant_method": "gptq"})


def awq(directory: Path, tokenizer: Path) -> Path:
    """AWQ, 4 bits with zero points, groups of 32 inputs."""

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        turned = weight.float().T
        inputs, outputs = turned.shape
        groups = turned.reshape(-1, GROUP, outputs)
        low = groups.amin(1)
        scale = (groups.amax(1) - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        values = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)

        def packed(each: torch.Tensor) -> torch.Tensor:
            return _eight_in_one(each.reshape(-1, outputs // 8, 8)[:, :, _AWQ_ORDER])

        return {
            f"{base}.qweight": packed(values.reshape(inputs, outputs)),
            f"{base}.qzeros": packed(zero),
            f"{base}.scales": scale.half(),
        }

    settings = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _llama(directory, tokenizer, layer, settings | {"quant_method": "awq"})


def four_bits(directory: Path, tokenizer: Path, *, symmetric: bool) -> Path:
    """compressed-tensors' W4A16, packed, groups of 32 inputs; with zero points if not symmetric."""

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        outputs, inputs = weight.shape
        groups = weight.float().reshape(outputs, -1, GROUP)
        scale = groups.abs().amax(2) / 7
        values = (groups / scale[:, :, None]).round() + 8
        stored = {
            f"{base}.weight_packed": _eight_in_one(values.reshape(outputs, -1, 8)),
            f"{base}.weight_scale": scale.half(),
            f"{base}.weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            zeros = torch.full((inputs // GROUP, outputs // 8, 8), 8.0)
            stored[f"{base}.weight_zero_point"] = _eight_in_one(zeros).T.contiguous()
        return stored

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": GROUP}
    return _llama(directory, tokenizer, layer, _compressed("pack-quantized", weights, None))


def eight_bits(directory: Path, tokenizer: Path, *, static: bool) -> Path:
    """compressed-tensors' W8A8 in int8, a scale for each tensor; activations with a fixed scale if
    `static`."""

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().max() / 127
        stored = {
            f"{base}.weight": (weight.float() / scale).round().to(torch.int8),
            f"{base}.weight_scale": scale.reshape(1),
        }
        if static:
            stored[f"{base}.input_scale"] = torch.tensor([0.05])
        return stored

    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    activations = {"strategy": "tensor", "dynamic": False} if static else {"strategy": "token"}
    if not static:
        activations["dynamic"] = True
    settings = _compressed(
        "int-quantized", kind | {"strategy": "tensor", "dynamic": False}, kind | activations
    )
    return _llama(directory, tokenizer, layer, settings)


def fp8(directory: Path, tokenizer: Path, *, static: bool) -> Path:
    """FP8, a scale for each tensor; activations with a fixed scale if `static`."""

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        stored = _fp8(base, weight)
        if static:
            stored[f"{base}.input_scale"] = torch.tensor([0.05])
        return stored

    scheme = "static" if static else "dynamic"
    return _llama(directory, tokenizer, layer, {"quant_method": "fp8", "activation_scheme": scheme})


def fp8_in_blocks(directory: Path, tokenizer: Path) -> Path:
    """FP8 as DeepSeek's, a scale for each block of 128 x 128."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    blocks = settings | {"weight_block_size": [128, 128]}
    return _llama(directory, tokenizer, _fp8_in_blocks, blocks)


def fp8_experts(directory: Path, tokenizer: Path) -> Path:
    """A mixture of experts whose matrices are FP8 with a scale each."""
    tiny_models.mixture_of_experts(directory, tokenizer, torch.bfloat16)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    gates = [f"model.layers.{number}.mlp.gate" for number in range(2)]
    return _quantized(directory, _fp8, settings | {"ignored_layers": ["lm_head", *gates]})


def eight_bit_experts(directory: Path, tokenizer: Path) -> Path:
    """A mixture of experts in compressed-tensors' W8A8, a scale for each row."""
    tiny_models.mixture_of_experts(directory, tokenizer, torch.bfloat16)

    def layer(base: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        return {
            f"{base}.weight": (weight.float() / scale).round().to(torch.int8),
            f"{base}.weight_scale": scale,
        }

    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    settings = _compressed(
        "int-quantized",
        kind | {"strategy": "channel", "dynamic": False},
        kind | {"strategy": "token", "dynamic": True},
    )
    return _quantized(directory, layer, settings)


def _fp8(base: str, weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().max() / 448
    return {
        f"{base}.weight": (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{base}.weight_scale": scale.reshape(()),
    }


def _fp8_in_blocks(base: str, weight: torch.Tensor) -> Tensors:
    rows, columns = ((size + 127) // 128 for size in weight.shape)
    scale = torch.full((rows, columns), float(weight.float().abs().max() / 448))
    return {
        f"{base}.weight": (weight.float() / scale[0, 0]).to(torch.float8_e4m3fn),
        f"{base}.weight_scale_inv": scale,
    }


def _compressed(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def _llama(
    directory: Path,
    tokenizer: Path,
    layer: Callable[[str, torch.Tensor], Tensors],
    settings: dict[str, Any],
) -> Path:
    tiny_models.llama(directory, tokenizer, torch.float16, tied=False)
    return _quantized(directory, layer, settings)


def _quantized(
    directory: Path, layer: Callable[[str, torch.Tensor], Tensors], settings: dict[str, Any]
) -> Path:
    stored: Tensors = {}
    for name, tensor in load_file(directory / tiny_models.WEIGHTS).items():
        if name.endswith("_proj.weight"):
            stored |= layer(name.removesuffix(".weight"), tensor)
        else:
            stored[name] = tensor
    save_file(stored, directory / tiny_models.WEIGHTS, {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    return directory


def _eight_in_one(values: torch.Tensor) -> torch.Tensor:
    """4-bit values (…, 8), the first lowest, as int32 (…)."""
    shifts = torch.arange(0, 32, 4)
    packed = (values.to(torch.int64) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
