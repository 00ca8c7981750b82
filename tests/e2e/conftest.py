"""What the end-to-end tests share: stock vLLM's answers, asked for once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import STOCK_PROMPTS, stock_vllm


@pytest.fixture(scope="session")
def stock_answers(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path
) -> dict[str, tuple[str, list[float]]]:
    """{prompt: (text, log-probabilities)} of stock vLLM on SmolLM2's safetensors directory."""
    with stock_vllm(tmp_path_factory.mktemp("stock"), model_dir) as engine:
        engine.wait_ready()
        answers = engine.completions("model", STOCK_PROMPTS)
    return dict(zip(STOCK_PROMPTS, answers, strict=True))
