"""Tiny models with random weights, as Hugging Face directories: one for each kind of checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

WEIGHTS = "model.safetensors"
HIDDEN = 128
WIDE = 1536
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# What the tokenizer of the real model needs, and sizes that vLLM's CPU kernels take.
_SIZES = {
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(directory: Path, tokenizer: Path, dtype: torch.dtype, *, tied: bool) -> Path:
    """A Llama whose head is its embedding (`tied`) or a matrix of its own."""
    config = LlamaConfig(**_SIZES, tie_word_embeddings=tied)
    return _save(LlamaForCausalLM, config, directory, tokenizer, dtype)


def one_layer(directory: Path, tokenizer: Path) -> Path:
    """A Llama of which there is little to compile."""
    config = LlamaConfig(**_SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    return _save(LlamaForCausalLM, config, directory, tokenizer, torch.bfloat16)


def wrongly_tied(directory: Path, tokenizer: Path) -> Path:
    """A head of its own, which config.json denies: fine-tuning tools leave such directories."""
    llama(directory, tokenizer, torch.bfloat16, tied=False)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    return directory


def mixture_of_experts(directory: Path, tokenizer: Path, dtype: torch.dtype) -> Path:
    """A Qwen3-MoE: eight experts a layer, two for each token."""
    config = Qwen3MoeConfig(
        **_SIZES,
        tie_word_embeddings=False,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM, config, directory, tokenizer, dtype)


def wide_mixture_of_experts(directory: Path, tokenizer: Path) -> Path:
    """A Qwen3-MoE of four layers, each expert's matrices of 384 KiB: worth leaving out."""
    config = Qwen3MoeConfig(
        **_SIZES | {"num_hidden_layers": 4},
        tie_word_embeddings=False,
        moe_intermediate_size=WIDE,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM, config, directory, tokenizer, torch.bfloat16)


def quantized(directory: Path, tokenizer: Path) -> Path:
    """A Llama in compressed-tensors' W8A8: int8 weights with a scale for each row, activations
    quantized as they come. Head and embedding stay bfloat16."""
    llama(directory, tokenizer, torch.bfloat16, tied=False)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / 127
        stored[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
        stored[name.replace(".weight", ".weight_scale")] = scale.to(torch.bfloat16)
    save_file(stored, directory / WEIGHTS, {"format": "pt"})
    path = directory / "config.json"
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    return directory


def twin(directory: Path, model: Path) -> Path:
    """A draft model that answers as `model` does: the same weights, and a layer that adds nothing.

    Weights of `model` do not fill it.
    """
    path = model / "config.json"
    config = json.loads(path.read_text())
    last = config["num_hidden_layers"]
    weights = load_file(model / WEIGHTS)
    added = {
        name.replace(f"layers.{last - 1}.", f"layers.{last}."): tensor.clone()
        for name, tensor in weights.items()
        if f"layers.{last - 1}." in name
    }
    for name, tensor in added.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    directory.mkdir()
    save_file(weights | added, directory / WEIGHTS, {"format": "pt"})
    config["num_hidden_layers"] = last + 1
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def eagle(directory: Path, model: Path) -> Path:
    """EAGLE's head for a Llama: one layer, and a matrix that joins embedding and hidden state."""
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(model / WEIGHTS).items()
        if ".layers.0." in name and not name.endswith("input_layernorm.weight")
    }
    weights["fc.weight"] = torch.cat([torch.eye(HIDDEN)] * 2, 1).to(torch.bfloat16) / 2
    directory.mkdir()
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1}
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def eagle3(directory: Path, model: Path) -> Path:
    """EAGLE 3's head for a Llama of two layers: one layer over embedding and hidden states, which
    has a head of its own and the model's embedding."""
    stored = load_file(model / WEIGHTS)
    layer = {
        name.partition("layers.1.")[2]: tensor
        for name, tensor in stored.items()
        if "layers.1." in name
    }
    weights = {f"midlayer.{name}": tensor for name, tensor in layer.items()}
    for projection in ("q", "k", "v"):
        name = f"midlayer.self_attn.{projection}_proj.weight"
        weights[name] = torch.cat([weights[name]] * 2, 1) / 2
    weights["midlayer.hidden_norm.weight"] = layer["input_layernorm.weight"].clone()
    weights["fc.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], 1)
    weights["norm.weight"] = stored["model.norm.weight"]
    weights["lm_head.weight"] = stored["lm_head.weight"]
    directory.mkdir()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": _SIZES["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [1, 2],
        "num_aux_hidden_states": 2,
    }
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def medusa(directory: Path, model: Path) -> Path:
    """Two of Medusa's heads for a Llama: each a layer, and a matrix over the vocabulary."""
    head = load_file(model / WEIGHTS)["lm_head.weight"]
    weights = {}
    for number in range(2):
        layer = torch.eye(HIDDEN, dtype=torch.bfloat16) * number
        weights[f"blocks.{number}.layers.0.weight"] = layer
        weights[f"lm_heads.{number}.weight"] = head.clone()
    directory.mkdir()
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": HIDDEN,
        "vocab_size": _SIZES["vocab_size"],
        "num_heads": 2,
        "num_hidden_layers": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def multi_token_prediction(directory: Path, tokenizer: Path) -> Path:
    """A GLM-4 with experts, and behind its layers one that drafts (MTP), in the same checkpoint."""
    config = Glm4MoeConfig(
        **_SIZES,
        tie_word_embeddings=False,
        moe_intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    _save(Glm4MoeForCausalLM, config, directory, tokenizer, torch.bfloat16)
    weights = load_file(directory / WEIGHTS)
    last, drafts = "model.layers.1.", "model.layers.2."
    added = {
        name.replace(last, drafts): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(last)
    }
    added[f"{drafts}eh_proj.weight"] = torch.cat([torch.eye(HIDDEN)] * 2, 1).to(torch.bfloat16)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{drafts}{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    added[f"{drafts}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    added[f"{drafts}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights | added, directory / WEIGHTS, {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    return directory


def _save(
    kind: Callable[[PreTrainedConfig], PreTrainedModel],
    config: PreTrainedConfig,
    directory: Path,
    tokenizer: Path,
    dtype: torch.dtype,
) -> Path:
    torch.manual_seed(0)
    config.dtype = dtype
    kind(config).to(dtype).save_pretrained(directory)
    for name in _TOKENIZER:
        (directory / name).write_bytes((tokenizer / name).read_bytes())
    return directory
