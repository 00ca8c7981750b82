"""LoRA adapters: packed and encrypted with their model, served from S3 under their own names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from running import BIN, Tensorserve, clean_environment, stock_vllm

from lora_adapter import make_adapter

PROMPTS = ["The capital of France is", "1 2 3 4"]


def test_adapters_of_a_bundle_answer_as_with_stock_vllm(
    tmp_path: Path, model_dir: Path, s3
) -> None:
    """Two adapters, one of a rank above vLLM's default; their plain text is on no disk."""
    ranks = {"sql": 8, "tone.v2": 24}
    paths = {
        name: make_adapter(tmp_path / name, model_dir, rank=rank, seed=rank)
        for name, rank in ranks.items()
    }
    s3.make_bucket("models")
    key_file = tmp_path / "key"
    words = [str(BIN / "tensorserve"), "pack", str(model_dir), "s3://models", "--suffix", "v1"]
    words += ["--encrypt", "--key-file", str(key_file)]
    for name, path in paths.items():
        words += ["--lora", f"{name}={path}"]
    environ = clean_environment() | s3.environment
    packed = subprocess.run(words, env=environ, check=True, capture_output=True, text=True)
    assert "adapters: sql, tone.v2" in packed.stdout
    uri = f"s3://models/vllm/{model_dir.name}/v1"

    stock = stock_vllm(tmp_path, model_dir)
    stock.command += ["--enable-lora", "--max-lora-rank", "32", "--lora-modules"]
    stock.command += [f"{name}={path}" for name, path in paths.items()]
    with stock:
        stock.wait_ready()
        wanted = {name: stock.completions(name, PROMPTS) for name in ("model", *paths)}
    assert len({str(answer) for answer in wanted.values()}) == 3, "the adapters change nothing"

    settings = {"TENSORSERVE_MODEL_URI": uri, "TENSORSERVE_KEY_FILE": str(key_file)}
    with Tensorserve(tmp_path, s3.environment | settings) as engine:
        engine.wait_ready()
        status, body = engine.get("/v1/models")
        assert status == 200
        assert {model["id"] for model in json.loads(body)["data"]} == {"model", *paths}
        for name, answer in wanted.items():
            assert engine.completions(name, PROMPTS) == answer, name
        files = [p for p in engine.state_dir.rglob("*") if p.is_file() and not p.is_symlink()]
        # Of the model there is a header without data (bundle/stand_ins.py).
        assert not [p for p in files if p.name == "adapter_model.safetensors"]

    checked = subprocess.run(
        [words[0], "verify", uri],
        env=environ | {"TENSORSERVE_KEY_FILE": str(key_file)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "adapters/sql/adapter_model.tensors" in checked.stdout
