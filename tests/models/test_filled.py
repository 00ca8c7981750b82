"""No parameter is served that no tensor filled: each quantization that vLLM's CPU build has.

Of a whole checkpoint vLLM's model is filled; without one of its tensors the load ends, and names
the parameter. Most of it in one process, without an engine (filled_probe.py). That whole ones
answer as stock does, test_matrix.py shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_models
import tiny_models
import torch
from running import Tensorserve
from safetensors.torch import load_file, save_file
from test_models import pack

ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.0.mlp"
EXPERT = "model.layers.1.mlp.experts.5"
# What each checkpoint may lack beside its linear layers' own.
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
COMMON = {
    NORM: "'model.norm.weight'",
    "model.layers.0.input_layernorm.weight": "'model.layers.0.input_layernorm.weight'",
    EMBEDDING: "'model.embed_tokens.weight'",
    HEAD: "'lm_head.weight'",
}


def linear(*kinds: str) -> dict[str, str]:
    """One tensor of each kind, each of another part of a layer, and the parameter it belongs to."""
    found: dict[str, str] = {}
    for kind in kinds:
        found |= {
            f"{ATTENTION}.k_proj.{kind}": f"{ATTENTION}.qkv_proj.{kind}",
            f"{ATTENTION}.v_proj.{kind}": f"{ATTENTION}.qkv_proj.{kind}",
            f"{MLP}.up_proj.{kind}": f"{MLP}.gate_up_proj.{kind}",
            f"{MLP}.down_proj.{kind}": f"{MLP}.down_proj.{kind}",
        }
    return found


def experts(*kinds: str) -> dict[str, str]:
    """The same of one expert of eight."""
    found: dict[str, str] = {}
    for kind in kinds:
        found |= {
            f"{EXPERT}.down_proj.{kind}": f"experts.routed_experts.w2_{kind}",
            f"{EXPERT}.up_proj.{kind}": f"experts.routed_experts.w13_{kind}",
        }
    return found


def _llama(directory: Path, tokenizer: Path) -> Path:
    return tiny_models.llama(directory, tokenizer, torch.bfloat16, tied=False)


def _experts(directory: Path, tokenizer: Path) -> Path:
    return tiny_models.mixture_of_experts(directory, tokenizer, torch.bfloat16)


# How each is made, and which parameter goes unfilled without which tensor.
KINDS: dict[str, tuple[Callable[[Path, Path], Path], dict[str, str]]] = {
    "unquantized": (_llama, linear("weight")),
    "experts": (_experts, linear("weight") | experts("weight")),
    "gptq": (quantized_models.gptq, linear("qweight", "scales", "qzeros")),
    "awq": (quantized_models.awq, linear("qweight", "scales", "qzeros")),
    "w4a16": (
        lambda d, t: quantized_models.four_bits(d, t, symmetric=True),
        linear("weight_packed", "weight_scale"),
    ),
    "w4a16-with-zero-points": (
        lambda d, t: quantized_models.four_bits(d, t, symmetric=False),
        linear("weight_packed", "weight_scale", "weight_zero_point"),
    ),
    "w8a8-a-scale-for-each-row": (tiny_models.quantized, linear("weight", "weight_scale")),
    "fp8": (
        lambda d, t: quantized_models.fp8(d, t, static=False),
        linear("weight", "weight_scale"),
    ),
    "fp8-static": (
        lambda d, t: quantized_models.fp8(d, t, static=True),
        linear("weight", "weight_scale", "input_scale"),
    ),
    "w8a8-a-scale-for-each-tensor": (
        lambda d, t: quantized_models.eight_bits(d, t, static=False),
        linear("weight", "weight_scale"),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Callable[[str], Path]:
    """The checkpoint of a kind, made once."""
    base = tmp_path_factory.mktemp("filled")

    def make(name: str) -> Path:
        directory = base / name
        return directory if directory.exists() else KINDS[name][0](directory, model_dir)

    return make


def outcomes(cases: list[tuple[Path, list[str], dict[str, Any]]]) -> list[str]:
    """What comes of each: (checkpoint, names left out, vLLM's arguments)."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("filled_probe.py"))],
        input=json.dumps([(str(path), names, arguments) for path, names, arguments in cases]),
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("result:")]
    return [json.loads(line.removeprefix("result:")) for line in lines]


@pytest.mark.parametrize("name", KINDS)
def test_each_tensor_that_is_missing_is_noticed(made: Callable[[str], Path], name: str) -> None:
    """One of q, k and v, one expert's, a scale, a zero point, a norm, embedding, head."""
    path, needed = made(name), KINDS[name][1] | COMMON
    found = outcomes([(path, names, {}) for names in ([], *([each] for each in needed))])
    assert found[0] == "filled"
    for (left_out, parameter), said in zip(needed.items(), found[1:], strict=True):
        assert said.startswith("65 The file's tensors do not fill 1 of the "), (left_out, said)
        assert parameter in said, left_out


@pytest.mark.parametrize("loader", ["auto", "reference"])
def test_a_quantized_model_without_its_second_file_is_not_served(
    tmp_path: Path, made: Callable[[str], Path], loader: str
) -> None:
    """As found in the field: it was served uninitialised, by either reader."""
    model = tmp_path / "model"
    model.mkdir()
    for path in made("gptq").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = load_file(model / tiny_models.WEIGHTS)
    first = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(first, model / tiny_models.WEIGHTS, {"format": "pt"})
    settings = pack(model, tmp_path) | {"TENSORSERVE_VLLM_DTYPE": "float16"}
    with Tensorserve(tmp_path, settings | {"TENSORSERVE_LOADER": loader}) as engine:
        assert engine.process is not None
        assert engine.process.wait(240) == 65
        assert "The file's tensors do not fill " in engine.text
        # Without tensors of this layer in its headers, vLLM may take it for one of 16 bit.
        assert "'model.layers.1.self_attn.qkv_proj." in engine.text
