"""Ranks leave out what is others', and answer as stock vLLM's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from running import Tensorserve, stock_vllm
from test_models import PROMPTS, pack

# One core for each rank: vLLM would otherwise give both the same ones.
BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
PARALLEL = {
    "pipeline": ("--pipeline-parallel-size=2",),
    "expert": ("--tensor-parallel-size=2", "--enable-expert-parallel"),
}


@pytest.mark.parametrize("kind", PARALLEL)
def test_ranks_read_what_they_hold(tmp_path: Path, model_dir: Path, kind: str) -> None:
    """Of layers and experts above 256 KiB; the answers are bit for bit stock vLLM's."""
    model = tiny_models.wide_mixture_of_experts(tmp_path / "model", model_dir)
    stock = stock_vllm(tmp_path, model)
    stock.command += PARALLEL[kind]
    stock.environment |= BINDING
    with stock:
        stock.wait_ready()
        wanted = stock.completions("model", PROMPTS)
    with Tensorserve(tmp_path, pack(model, tmp_path), *PARALLEL[kind]) as engine:
        engine.environment |= BINDING
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == wanted
        plans = {e["rank"]: e["bytes"] for e in engine.events() if e["event"] == "load_plan"}
    whole = (model / "model.safetensors").stat().st_size
    experts = 4 * 8 * 3 * tiny_models.HIDDEN * tiny_models.WIDE * torch.bfloat16.itemsize
    assert sorted(plans) == [0, 1]
    for read in plans.values():
        assert read < whole - experts // 2 + 2**20
