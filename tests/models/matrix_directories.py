"""Shapes of a model's directory: how weights, head, tokenizer and configuration lie in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matrix_models import Maker, causal, edit
from safetensors.torch import load_file, save_file

from lora_adapter import make_adapter

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TEKKEN = 32768


def llama(dtype: torch.dtype, **settings: Any) -> Maker:
    """A Llama of `dtype`."""
    return causal("Llama", dtype, **settings)


def unnamed(dtype: torch.dtype) -> Maker:
    """A Llama of `dtype`, and config.json names none."""

    def make(directory: Path, tokenizer: Path) -> Path:
        llama(dtype)(directory, tokenizer)
        return edit(directory, drop=("dtype", "torch_dtype"))

    return make


def wrongly_tied(directory: Path, tokenizer: Path) -> Path:
    """A head of its own, which config.json denies."""
    llama(torch.bfloat16)(directory, tokenizer)
    return edit(directory, tie_word_embeddings=True)


def tied_twice(directory: Path, tokenizer: Path) -> Path:
    """A tied head that stands in the file as well, equal to the embedding."""
    llama(torch.bfloat16, tie_word_embeddings=True)(directory, tokenizer)
    tensors = load_file(directory / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


def sharded(
    parts: int, *, index: bool = True, tied: bool = False, named_too: Sequence[str] = ()
) -> Maker:
    """`parts` files, with an index or without; the index names `named_too` as well."""

    def make(directory: Path, tokenizer: Path) -> Path:
        llama(torch.bfloat16, tie_word_embeddings=tied)(directory, tokenizer)
        tensors = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names, places = sorted(tensors), {}
        for part in range(parts):
            file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
            held = names[part::parts]
            save_file({n: tensors[n] for n in held}, directory / file, {"format": "pt"})
            places |= dict.fromkeys(held, file)
        places |= dict.fromkeys(named_too, file)
        if index:
            total = sum(tensor.nbytes for tensor in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": places}
            (directory / INDEX).write_text(json.dumps(content))
        return directory

    return make


def two_files(directory: Path, tokenizer: Path) -> Path:
    """model.safetensors and the last layer in a file of another name, without an index."""
    llama(torch.bfloat16)(directory, tokenizer)
    tensors = load_file(directory / WEIGHTS)
    last = {name: tensors.pop(name) for name in list(tensors) if "layers.1." in name}
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    save_file(last, directory / "model-extra.safetensors", {"format": "pt"})
    return directory


def mistral(directory: Path, _tokenizer: Path) -> Path:
    """Mistral's own layout: params.json, consolidated.safetensors, tekken.json."""
    directory.mkdir()
    torch.manual_seed(1)
    wide, heads, shared, head, inner = 128, 4, 2, 32, 256

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(wide)).to(torch.bfloat16)

    tensors = {
        "tok_embeddings.weight": drawn(_TEKKEN, wide),
        "norm.weight": norm(),
        "output.weight": drawn(_TEKKEN, wide),
    }
    for layer in range(2):
        shapes = {
            "attention.wq": (heads * head, wide),
            "attention.wk": (shared * head, wide),
            "attention.wv": (shared * head, wide),
            "attention.wo": (wide, heads * head),
            "feed_forward.w1": (inner, wide),
            "feed_forward.w2": (wide, inner),
            "feed_forward.w3": (inner, wide),
        }
        tensors |= {f"layers.{layer}.{n}.weight": drawn(*shape) for n, shape in shapes.items()}
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{layer}.{name}.weight"] = norm()
    save_file(tensors, directory / "consolidated.safetensors", {"format": "pt"})
    params = {"dim": wide, "n_layers": 2, "head_dim": head, "hidden_dim": inner}
    params |= {"n_heads": heads, "n_kv_heads": shared, "vocab_size": _TEKKEN, "norm_eps": 1e-5}
    params |= {"rope_theta": 1e6, "max_position_embeddings": 2048, "max_seq_len": 2048}
    (directory / "params.json").write_text(json.dumps(params))
    found = find_spec("mistral_common")
    assert found is not None
    assert found.origin is not None
    shipped = Path(found.origin).with_name("data") / "tekken_240911.json"
    tekken = json.loads(shipped.read_text())
    kept = _TEKKEN - tekken["config"].get("default_num_special_tokens", 1000)
    tekken["vocab"] = tekken["vocab"][:kept]
    tekken["config"]["default_vocab_size"] = _TEKKEN
    (directory / "tekken.json").write_text(json.dumps(tekken))
    return directory


def both_layouts(directory: Path, tokenizer: Path) -> Path:
    """Hugging Face's layout and Mistral's own in one directory, as Mistral publishes: the same
    weights under both names would do; here they differ, so that one sees which was read.
    """
    mistral(directory, tokenizer)
    causal("Mistral", vocab_size=_TEKKEN)(directory, tokenizer)
    return directory


def chat_template(directory: Path, tokenizer: Path) -> Path:
    """A chat template in a file of its own."""
    llama(torch.bfloat16)(directory, tokenizer)
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} ;{% endfor %} <answer>"
    (directory / "chat_template.jinja").write_text(template)
    return directory


def generation_config(directory: Path, tokenizer: Path) -> Path:
    """What vLLM takes as default of a request: a strong penalty for what was said before."""
    llama(torch.bfloat16, tie_word_embeddings=True)(directory, tokenizer)
    return edit(directory, "generation_config.json", repetition_penalty=1.9)


def sentencepiece(directory: Path, tokenizer: Path) -> Path:
    """A tokenizer of sentencepiece's, tokenizer.model, trained on our own pages."""
    import sentencepiece as trainer

    llama(torch.bfloat16, vocab_size=1000)(directory, tokenizer)
    (directory / "tokenizer.json").unlink()
    pages = sorted(Path(__file__).parents[2].glob("docs/*.md"))
    prefix = directory / "tokenizer"
    trainer.SentencePieceTrainer.train(
        input=",".join(map(str, pages)), model_prefix=str(prefix), vocab_size=1000,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
    )  # fmt: skip
    prefix.with_suffix(".vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "legacy": False, "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def remote_code(directory: Path, tokenizer: Path) -> Path:
    """config.json names a class of its own, in a .py beside it."""
    llama(torch.bfloat16)(directory, tokenizer)
    (directory / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        'class OwnConfig(LlamaConfig):\n    model_type = "own_llama"\n'
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig"}
    return edit(directory, model_type="own_llama", auto_map=classes)


def with_adapter(directory: Path, tokenizer: Path) -> Path:
    """A Llama, and beside its directory an adapter, `tuned`."""
    llama(torch.bfloat16)(directory, tokenizer)
    make_adapter(directory.with_name("tuned"), directory)
    return directory


def no_generation_config(directory: Path, tokenizer: Path) -> Path:
    """Only what is needed: config.json, weights, tokenizer.json."""
    llama(torch.bfloat16)(directory, tokenizer)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink()
    return directory


def pickled(directory: Path, tokenizer: Path) -> Path:
    """Weights as torch's pickle, pytorch_model.bin."""
    llama(torch.bfloat16)(directory, tokenizer)
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    return directory
