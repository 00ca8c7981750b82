"""Tiny Hugging Face directories, made with the real safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorserve.sources import Access

ACCESS = Access()


def tensors() -> dict[str, torch.Tensor]:
    """Some dtypes, some sizes, one tensor of several chunks."""
    generator = torch.Generator().manual_seed(5)
    return {
        "model.embed.weight": torch.randn(700, 1024, generator=generator),
        "model.layers.0.weight": torch.randn(16, 16, generator=generator).to(torch.bfloat16),
        "model.layers.1.weight": torch.randn(16, 16, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.ones(16),
        "model.scale": torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn),
    }


def make_model(directory: Path, content: dict[str, torch.Tensor] | None = None) -> Path:
    """A single-file model with configuration, tokenizer, and things that are not wanted."""
    directory.mkdir(parents=True)
    save_file(content or tensors(), directory / "model.safetensors", {"format": "pt"})
    add_small_files(directory)
    return directory


def make_sharded(directory: Path) -> Path:
    """The same tensors in two files and an index."""
    directory.mkdir(parents=True)
    content = tensors()
    names = list(content)
    parts = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for file, members in parts.items():
        save_file({name: content[name] for name in members}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    add_small_files(directory)
    return directory


def add_small_files(directory: Path) -> None:
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "README.md").write_text("# A model")
    (directory / "modeling_own.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / ".gitattributes").write_text("")


SMALL_FILES = ("1_Pooling/config.json", "chat_template.jinja", "config.json", "tokenizer.json")
