"""What speculates beside a bundle answers, and drafts, as beside stock vLLM."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from prometheus_client.parser import text_string_to_metric_families
from running import BIN, Running, Tensorserve, clean_environment, stock_vllm
from s3server import S3Server
from test_models import PROMPTS, pack

# vLLM compares a prompt with itself: here it finds something.
REPEATED = [*PROMPTS, "one two three one two three one two three one two"]


DRAFTS: dict[str, Callable[[Path, Path], Path]] = {
    "draft_model": tiny_models.twin,
    "eagle": tiny_models.eagle,
    "eagle3": tiny_models.eagle3,
}


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
    return model, {"model": str(DRAFTS[method](base / "draft", model)), "num_speculative_tokens": 2}


@pytest.mark.parametrize("method", [*DRAFTS, "mtp", "ngram"])
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


@pytest.mark.parametrize(
    ("method", "loader"), [("draft_model", "auto"), ("eagle", "auto"), ("eagle3", "reference")]
)
def test_a_packed_draft_drafts_as_stock_vllm_does(
    tmp_path: Path, model_dir: Path, s3: S3Server, method: str, loader: str
) -> None:
    """Sealed in a bucket; by both readers. Its plain text is on no disk, and its bytes count."""
    model, options = made(method, tmp_path, model_dir)
    draft = str(options["model"])
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--speculative-config", json.dumps({"method": method, **options})]
    with stock:
        stock.wait_ready()
        wanted = stock.completions("model", REPEATED), counts(stock)
    assert wanted[1]["vllm:spec_decode_num_accepted_tokens_total"] > 0

    bucket = method.replace("_", "-")
    s3.make_bucket(bucket)
    environ = s3.environment | {
        "TENSORSERVE_MODEL_URI": f"s3://{bucket}/v1",
        "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
        "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": json.dumps(
            {"method": method, "num_speculative_tokens": 2}
        ),
        "TENSORSERVE_LOADER": loader,
    }
    words = ["pack", str(model), environ["TENSORSERVE_MODEL_URI"], "--draft", draft, "--encrypt"]
    run(s3.environment, *words, "--key-file", environ["TENSORSERVE_KEY_FILE"])
    engine = Tensorserve(tmp_path, environ)
    assert "packed with the bundle" in run(engine.environment, "check")
    with engine:
        engine.wait_ready()
        assert (engine.completions("model", REPEATED), counts(engine)) == wanted
        files = [p for p in engine.state_dir.rglob("*") if p.is_file() and not p.is_symlink()]
        largest = max(file.stat().st_size for file in files)
        loaded = engine.metric("tensorserve_load_size_bytes", rank="0")
        checks = {e["name"]: e["found"] for e in engine.events() if e["event"] == "check"}
    assert "draft/draft/model.tensors" in checks["draft"]
    stored = sum((Path(d) / tiny_models.WEIGHTS).stat().st_size for d in (model, draft))
    assert loaded is not None
    assert stored - 2**14 < loaded <= stored
    assert largest < 2**23


def test_two_ranks_load_a_packed_draft(tmp_path: Path, model_dir: Path, s3: S3Server) -> None:
    """Each its slices, of what one of them fetches; the draft agrees only with its own weights."""
    model, options = made("draft_model", tmp_path, model_dir)
    s3.make_bucket("ranks")
    environ = s3.environment | {
        "TENSORSERVE_MODEL_URI": "s3://ranks/v1",
        "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
        "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": '{"num_speculative_tokens": 2}',
        "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    words = ["pack", str(model), environ["TENSORSERVE_MODEL_URI"], "--encrypt", "--key-file"]
    run(s3.environment, *words, environ["TENSORSERVE_KEY_FILE"], "--draft", str(options["model"]))
    with Tensorserve(tmp_path, environ) as engine:
        engine.wait_ready()
        engine.completions("model", REPEATED)
        drafted, accepted = sorted(counts(engine).values(), reverse=True)
        plans = [e["rank"] for e in engine.events() if e["event"] == "load_plan"]
    assert sorted(plans) == [0, 0, 1, 1]
    assert accepted > drafted * 0.8


def run(environ: dict[str, str], *words: str) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [str(BIN / "tensorserve"), *words],
        env=clean_environment() | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_draft_that_was_not_packed_is_said_before_vllm_starts(
    tmp_path: Path, model_dir: Path
) -> None:
    """With the command that packs one; `check` says the same."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=True)
    speculative = json.dumps({"method": "eagle3", "num_speculative_tokens": 2})
    settings = pack(model, tmp_path) | {"TENSORSERVE_VLLM_SPECULATIVE_CONFIG": speculative}
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(120) == 78
        assert "tensorserve pack SRC DEST --draft DIR" in engine.text
        assert not [e for e in engine.events() if e.get("phase") == "import"]


def test_a_bundle_in_vllms_layout_has_no_layers_that_draft(tmp_path: Path, model_dir: Path) -> None:
    """Before vLLM starts."""
    model = tiny_models.multi_token_prediction(tmp_path / "model", model_dir)
    speculative = json.dumps({"method": "mtp", "num_speculative_tokens": 1})
    settings = pack(model, tmp_path, "vllm") | {"TENSORSERVE_VLLM_SPECULATIVE_CONFIG": speculative}
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(120) == 78
        assert "vLLM's own layout, without what 'mtp' drafts with" in engine.text
