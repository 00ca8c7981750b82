"""Model classes of the matrix: tiny models with random weights that vLLM's CPU kernels take.

Each tensor is drawn anew, norms and biases too: with weights as they are initialised, many a wrong
load would answer as the right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

Maker = Callable[[Path, Path], Path]

VOCABULARY = 49152
"""Of the tokenizer of the real model."""
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_BASE: dict[str, Any] = TOKENS | {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
SIZES: dict[str, Any] = _BASE | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}


def causal(name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Maker:
    """A maker of `<name>Config`'s causal model, with SIZES where `settings` say nothing else."""

    def make(directory: Path, tokenizer: Path) -> Path:
        # `head_dim=None`: a configuration that computes it and takes none.
        given = {k: v for k, v in (SIZES | settings).items() if (k, v) != ("head_dim", None)}
        config = getattr(transformers, f"{name}Config")(**given)
        return save(transformers.AutoModelForCausalLM, config, directory, tokenizer, dtype)

    return make


def save(
    kind: Any, config: Any, directory: Path, tokenizer: Path, dtype: torch.dtype, **written: Any
) -> Path:
    """Draw a model of `kind` (an Auto class or a class) and write it; `tokenizer`: whose files."""
    torch.manual_seed(0)
    config.dtype = dtype
    made = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    drawn(made).to(dtype).save_pretrained(directory, **written)
    copy_tokenizer(tokenizer, directory)
    return directory


def drawn(model: torch.nn.Module) -> Any:
    """`model` with noise on each parameter: matrices keep a signal's size, vectors move by 0.1."""
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * deviation)
    return model


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The files of a tokenizer, without a chat template of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())


def edit(
    directory: Path, name: str = "config.json", drop: tuple[str, ...] = (), **new: Any
) -> Path:
    """Change a JSON file of `directory`."""
    path = directory / name
    content = json.loads(path.read_text()) | new
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in drop}, indent=1))
    return directory


_GPT = TOKENS | {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 2, "n_head": 4}
# Sizes that DeepSeek's attention kernel for CPU is compiled for.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

CAUSAL: dict[str, Maker] = {
    "LlamaForCausalLM": causal("Llama"),
    "Qwen2ForCausalLM": causal("Qwen2"),
    "Qwen3ForCausalLM": causal("Qwen3"),
    "GemmaForCausalLM": causal("Gemma", tie_word_embeddings=True),
    "Gemma2ForCausalLM": causal("Gemma2", tie_word_embeddings=True, query_pre_attn_scalar=32),
    "Gemma3ForCausalLM": causal("Gemma3Text", tie_word_embeddings=True, query_pre_attn_scalar=32),
    "Phi3ForCausalLM": causal("Phi3"),
    "PhiForCausalLM": causal("Phi"),
    "GPT2LMHeadModel": causal("GPT2", **_GPT),
    "GPTJForCausalLM": causal("GPTJ", **_GPT, rotary_dim=16),
    "GPTNeoXForCausalLM": causal("GPTNeoX", num_key_value_heads=4),
    "OPTForCausalLM": causal("OPT", ffn_dim=256, word_embed_proj_dim=128, tie_word_embeddings=True),
    "FalconForCausalLM": causal("Falcon", head_dim=None, tie_word_embeddings=True),
    "BloomForCausalLM": causal("Bloom", n_head=4, n_layer=2, tie_word_embeddings=True),
    "MistralForCausalLM": causal("Mistral"),
    "MixtralForCausalLM": causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen2MoeForCausalLM": causal(
        "Qwen2Moe", **_EXPERTS, num_experts=4, shared_expert_intermediate_size=128
    ),
    "Qwen3MoeForCausalLM": causal("Qwen3Moe", **_EXPERTS, num_experts=8, norm_topk_prob=True),
    "OlmoeForCausalLM": causal("Olmoe", num_experts=4, num_experts_per_tok=2),
    "PhimoeForCausalLM": causal("Phimoe", num_local_experts=4, num_experts_per_tok=2),
    "GraniteMoeForCausalLM": causal("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "DeepseekV3ForCausalLM": causal(
        "DeepseekV3",
        **_LATENT | _EXPERTS,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        first_k_dense_replace=1,
    ),
    "DeepseekV2ForCausalLM": causal(
        "DeepseekV2",
        **_LATENT | _EXPERTS,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        topk_method="greedy",
        first_k_dense_replace=1,
    ),
    "GptOssForCausalLM": causal("GptOss", num_local_experts=4, num_experts_per_tok=2),
    "Glm4MoeForCausalLM": causal(
        "Glm4Moe",
        **_EXPERTS,
        n_routed_experts=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "MambaForCausalLM": causal("Mamba", state_size=16, tie_word_embeddings=True),
    "Mamba2ForCausalLM": causal(
        "Mamba2", num_heads=8, head_dim=32, n_groups=1, state_size=16, tie_word_embeddings=True
    ),
    "JambaForCausalLM": causal(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        use_mamba_kernels=False,
    ),
    "Qwen3NextForCausalLM": causal(
        "Qwen3Next",
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
    ),
    "Lfm2ForCausalLM": causal(
        "Lfm2",
        layer_types=["conv", "full_attention"],
        # vLLM reads them, as checkpoints have them; transformers' configuration knows neither.
        conv_dim=SIZES["hidden_size"],
        block_dim=SIZES["hidden_size"],
    ),
    "CohereForCausalLM": causal("Cohere", tie_word_embeddings=True),
    "StableLmForCausalLM": causal("StableLm"),
    "Starcoder2ForCausalLM": causal("Starcoder2"),
    "GraniteForCausalLM": causal("Granite"),
    "Olmo2ForCausalLM": causal("Olmo2"),
    "Glm4ForCausalLM": causal("Glm4"),
    "NemotronForCausalLM": causal("Nemotron"),
    "Exaone4ForCausalLM": causal("Exaone4"),
    "SmolLM3ForCausalLM": causal("SmolLM3"),
}
"""By the architecture that config.json names."""


def t5(directory: Path, tokenizer: Path) -> Path:
    """T5: an encoder and a decoder."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        eos_token_id=2, pad_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return save(
        transformers.T5ForConditionalGeneration, config, directory, tokenizer, torch.bfloat16
    )
