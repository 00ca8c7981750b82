"""LoRA adapters in a bundle of layout `vllm`: the model is built without them, and takes them."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import torch
from running import Tensorserve, stock_vllm

from lora_adapter import make_adapter
from tensorserve.cli import main as tensorserve

PROMPTS = ["The capital of France is", "1 2 3 4"]


def test_adapters_answer_as_with_stock_vllm(tmp_path: Path, model_dir: Path) -> None:
    """The model and its adapter, each in its own way."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=False)
    adapter = make_adapter(tmp_path / "sql", model)
    bundle, key = tmp_path / "bundle", tmp_path / "key"
    words = ["pack", str(model), str(bundle), "--layout", "vllm", "--lora", f"sql={adapter}"]
    assert tensorserve([*words, "--encrypt", "--key-file", str(key)]) == 0
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--enable-lora", "--lora-modules", f"sql={adapter}"]
    with stock:
        stock.wait_ready()
        wanted = {name: stock.completions(name, PROMPTS) for name in ("model", "sql")}
    assert wanted["model"] != wanted["sql"]
    settings = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY_FILE": str(key)}
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        for name, answer in wanted.items():
            assert engine.completions(name, PROMPTS) == answer, name
