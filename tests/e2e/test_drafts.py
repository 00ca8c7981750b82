"""A draft model with a directory of its own serves beside an encrypted bundle.

That the answers are stock vLLM's, and EAGLE, MTP and n-grams: tests/models/test_drafts.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
import torch
from prometheus_client.parser import text_string_to_metric_families
from running import Tensorserve

from tensorserve.cli import main as tensorserve


def engine_metric(engine: Tensorserve, name: str) -> float:
    """A counter of vLLM's own metrics."""
    _, body = engine.get("/metrics")
    return sum(
        sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if sample.name == name
    )


def test_a_draft_is_read_from_its_own_directory(tmp_path: Path, model_dir: Path) -> None:
    """It agrees with the model where it has its own weights, which the bundle's would not fill."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=False)
    draft = tiny_models.twin(tmp_path / "draft", model)
    bundle, key = tmp_path / "bundle", tmp_path / "key"
    assert tensorserve(["pack", str(model), str(bundle), "--encrypt", "--key-file", str(key)]) == 0
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    settings = {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY_FILE": str(key),
        "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": json.dumps(speculative),
    }
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        engine.completions("model", ["The capital of France is", "1 2 3 4"])
        drafted = engine_metric(engine, "vllm:spec_decode_num_draft_tokens_total")
        accepted = engine_metric(engine, "vllm:spec_decode_num_accepted_tokens_total")
        events = engine.events()
        assert engine.metric("tensorserve_load_progress_ratio", rank="0") == 1
    assert drafted > 0
    assert accepted > drafted * 0.8
    assert len([event for event in events if event["event"] == "load_plan"]) == 1
    begun = [e["phase"] for e in events if e["event"] == "phase" and e["state"] == "begin"]
    # The draft's own time is a load, after the model's.
    assert begun[-4:] == ["postprocess", "warmup", "load", "warmup"]
    checks = [event for event in events if event["event"] == "check"]
    assert ("draft", str(draft)) in [(check["name"], check["found"]) for check in checks]
