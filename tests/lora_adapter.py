"""A LoRA adapter as PEFT saves it, with random weights that are large enough to be heard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_adapter(directory: Path, model: Path, *, rank: int = 8, seed: int = 0) -> Path:
    """For the attention of the Llama in `model`: q_proj and v_proj of each layer."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * head_dim, "v_proj": config["num_key_value_heads"] * head_dim}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, out in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) * 0.05
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.05
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": list(rows),
                "bias": "none",
                "task_type": "CAUSAL_LM",
            }
        )
    )
    return directory
