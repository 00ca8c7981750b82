"""What speculates beside a bundle answers, and drafts, as beside stock vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from prometheus_client.parser import text_string_to_metric_families
from running import Running, Tensorserve, stock_vllm
from test_models import PROMPTS, pack

# vLLM compares a prompt with itself: here it finds something.
REPEATED = [*PROMPTS, "one two three one two three one two three one two"]


def counts(engine: Running) -> dict[str, float]:
    """How many tokens were drafted and accepted."""
    _, body = engine.get("/metrics")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name
        in {
            "vllm:spec_decode_num_draft_tokens_total",
            "vllm:spec_decode_num_accepted_tokens_total",
        }
    }


def made(method: str, base: Path, tokenizer: Path) -> tuple[Path, dict[str, object]]:
    """The served model, and what drafts for it."""
    if method == "mtp":
        model = tiny_models.multi_token_prediction(base / "model", tokenizer)
        return model, {"num_speculative_tokens": 1}
    model = tiny_models.llama(base / "model", tokenizer, torch.bfloat16, tied=False)
    if method == "ngram":
        return model, {"num_speculative_tokens": 2, "prompt_lookup_max": 3}
    make = tiny_models.eagle if method == "eagle" else tiny_models.twin
    return model, {"model": str(make(base / "draft", model)), "num_speculative_tokens": 2}


@pytest.mark.parametrize("method", ["draft_model", "eagle", "mtp", "ngram"])
def test_answers_and_drafts_equal_those_of_stock_vllm(
    tmp_path: Path, model_dir: Path, method: str
) -> None:
    """Text, log-probabilities, and how many drafts were right: their weights are the same."""
    model, options = made(method, tmp_path, model_dir)
    speculative = json.dumps({"method": method, **options})
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--speculative-config", speculative]
    with stock:
        stock.wait_ready()
        wanted = stock.completions("model", REPEATED), counts(stock)
    settings = pack(model, tmp_path) | {"TENSORSERVE_VLLM_SPECULATIVE_CONFIG": speculative}
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert (engine.completions("model", REPEATED), counts(engine)) == wanted
    assert wanted[1]["vllm:spec_decode_num_draft_tokens_total"] > 0


def test_a_bundle_in_vllms_layout_has_no_layers_that_draft(tmp_path: Path, model_dir: Path) -> None:
    """Before vLLM starts."""
    model = tiny_models.multi_token_prediction(tmp_path / "model", model_dir)
    speculative = json.dumps({"method": "mtp", "num_speculative_tokens": 1})
    settings = pack(model, tmp_path, "vllm") | {"TENSORSERVE_VLLM_SPECULATIVE_CONFIG": speculative}
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(120) == 78
        assert "vLLM's own layout, without what 'mtp' drafts with" in engine.text
