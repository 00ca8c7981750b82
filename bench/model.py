"""The synthetic model: equal tensors as safetensors, as plain and as encrypted .tensors files.

Shaped like a small Llama (bf16, tied embeddings) with SmolLM2's tokenizer, so that vLLM can serve
it. Weights are random and the same on every machine of one torch version. Made once, then kept.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.digest import checksum, data_bytes, digest
from bench.directories import CACHE
from tensorserve.packing.key_file import prepare_key
from tensorserve.packing.pack import pack
from tensorserve.sources import Access

VOCABULARY = 49152  # SmolLM2's
HEAD = 64
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
# Files of an older version are written again.
LAYOUT = 1
_BARE_LAYOUT = 2


@dataclass(frozen=True)
class Model:
    """The model's files, and the digest of a correct load."""

    directory: Path
    digest: str
    tensors: int
    bytes: int

    @property
    def hugging_face(self) -> Path:
        """config.json, tokenizer, model.safetensors."""
        return self.directory / "huggingface"

    @property
    def files(self) -> dict[str, Path]:
        """{kind: file}."""
        return {
            "encrypted": self.directory / "encrypted" / "model.tensors",
            "plain": self.directory / "plain" / "model.tensors",
            "safetensors": self.hugging_face / "model.safetensors",
        }

    @property
    def key_file(self) -> Path:
        """Of the encrypted file; 32 bytes."""
        return self.directory / "model.key"


def parse_size(text: str) -> int:
    """Bytes of "1.5GB", "200MB" (decimal). Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is not a size like 200MB or 1.5GB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def ensure_model(
    size: int, directory: Path | None = None, *, bare: bool = False, device: str = "cpu"
) -> Model:
    """The model of about `size` bytes, below `directory`; whole, or not there.

    A bare one has no tokenizer, so that SmolLM2 and transformers are not needed, random bits for
    weights, no safetensors file, and its digest is a `checksum`, computed on `device`.
    """
    target = (directory or CACHE) / f"model-{size}-{f'bare-{_BARE_LAYOUT}' if bare else LAYOUT}"
    if not (target / "model.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as temporary:
            made = Path(temporary) / "model"
            _make(made, size, bare=bare, device=device)
            made.rename(target)
    known = json.loads((target / "model.json").read_text())
    return Model(target, known["digest"], known["tensors"], known["bytes"])


def configuration(size: int) -> dict[str, int]:
    """Width and depth of a Llama of about `size` bytes."""
    widths = ((8 * 10**9, 4096), (10**9, 2048), (4 * 10**8, 1024), (0, 512))
    hidden = next(width for least, width in widths if size >= least)
    inner = 4 * hidden
    heads = hidden // HEAD
    key_value_heads = max(1, heads // 4)
    layer = 2 * (2 * hidden * hidden + 2 * hidden * key_value_heads * HEAD + 3 * hidden * inner)
    layers = max(1, round((size - 2 * VOCABULARY * hidden) / layer))
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_hidden_layers": layers,
    }


def shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor, as transformers and vLLM name them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = config["num_key_value_heads"] * HEAD
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def random_tensors(size: int) -> dict[str, torch.Tensor]:
    """The weights: small, and around 1 for norms, so that the model computes finite numbers."""
    generator = torch.Generator().manual_seed(20261123)
    tensors = {}
    for name, shape in shapes(configuration(size)):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        tensors[name] = tensor + 1 if len(shape) == 1 else tensor
    return tensors


def random_bits(size: int) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes for a model that is only loaded: ten times as fast to make."""
    generator = torch.Generator().manual_seed(20261130)
    tensors = {}
    for name, shape in shapes(configuration(size)):
        count = prod(shape)
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(generator=generator)
        tensors[name] = words.view(torch.bfloat16)[:count].reshape(shape)
    return tensors


def _make(target: Path, size: int, *, bare: bool, device: str) -> None:
    print(f"making the model of {size / 1e9:.2f} GB (once) ...", flush=True)
    made = Model(target, "", 0, 0)
    made.hugging_face.mkdir(parents=True)
    config: dict[str, object] = {} if bare else _small_files(made.hugging_face)
    config |= configuration(size) | {"head_dim": HEAD, "vocab_size": VOCABULARY}
    config["_name_or_path"] = "random"
    (made.hugging_face / "config.json").write_text(json.dumps(config, indent=2))
    tensors = random_bits(size) if bare else random_tensors(size)
    save_file(tensors, made.files["safetensors"], metadata={"format": "pt"})
    known = {
        "digest": checksum(tensors, device) if bare else digest(tensors),
        "tensors": len(tensors),
        "bytes": data_bytes(tensors),
    }
    del tensors
    key, _ = prepare_key(made.key_file, None)
    pack(made.hugging_face, str(made.files["encrypted"].parent), access=Access(), key=key)
    pack(made.hugging_face, str(made.files["plain"].parent), access=Access())
    if bare:
        made.files["safetensors"].unlink()
    # Written last: it shows that the other files are complete.
    (target / "model.json").write_text(json.dumps(known))


def _small_files(target: Path) -> dict[str, object]:
    """Copy SmolLM2's tokenizer to `target`; gives its configuration."""
    from smollm2 import ensure_model as ensure_real_model

    real = ensure_real_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(real / name, target / name)
    return dict(json.loads((real / "config.json").read_text()))
