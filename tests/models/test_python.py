"""What vLLM itself, from Python or by its own command, does with bundles of either layout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import tiny_models
import torch
from running import BIN, CPU_ENVIRONMENT, clean_environment
from test_llm import answers
from test_models import pack


def test_llm_loads_layout_vllm(tmp_path: Path, model_dir: Path) -> None:
    """`LLM(**llm_kwargs(…))`: the same texts as from the model's own directory."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=False)
    settings = pack(model, tmp_path, "vllm")
    key = {"key_file": settings["TENSORSERVE_KEY_FILE"]}
    ours, stock = answers(
        [
            {"uri": settings["TENSORSERVE_MODEL_URI"], "settings": key},
            {"llm": {"model": str(model)}},
        ]
    )
    assert ours == stock


def test_vllm_serve_of_a_bucket_is_still_refused_by_vllm() -> None:
    """docs/from-vllm-tensorizer.md says so; when vLLM takes it, our pages have to change."""
    done = subprocess.run(
        [str(BIN / "vllm"), "serve", "s3://bucket/model", "--load-format", "tensorizer"],
        env=clean_environment() | CPU_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode != 0
    # It wants the Run:ai streamer for a bucket, whatever the load format.
    assert "runai_model_streamer" in done.stderr
