"""A wide matrix of models: each is served from an encrypted bundle as stock serves its directory.

What was seen is written into matrix.json and docs/models.md, also where a test fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matrix_asking
import matrix_directories
import pytest
from forked import WarmVllm, ours, stock
from matrix_comparing import compare, last_words, packed, served
from matrix_kinds import KINDS
from matrix_page import record
from running import Tensorserve, stock_vllm
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmVllm]:
    """One process that has imported vLLM, for all starts of this file."""
    with WarmVllm() as process:
        yield process


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"{kind.group}: {name}") for name, kind in KINDS.items()]
)
def test_served_as_stock_serves(warm: WarmVllm, tmp_path: Path, model_dir: Path, name: str) -> None:
    """Equal to the last bit; or stock itself says that it cannot, in the words known here."""
    kind = KINDS[name]
    seen = compare(warm, tmp_path, model_dir, name, kind)
    record(seen, list(KINDS))
    assert kind.accepts(seen), (seen.result, seen.words)


def test_the_comparison_notices_one_changed_norm(
    warm: WarmVllm, tmp_path: Path, model_dir: Path
) -> None:
    """One number of one norm, by a fifth: other log-probabilities than stock's."""
    kind = KINDS["head tied to the embedding"]
    model = kind.make(tmp_path / "model", model_dir)
    wanted, _ = served(stock(warm, tmp_path, model, {}), kind)
    file = model / matrix_directories.WEIGHTS
    weights = load_file(file)
    weights["model.layers.1.post_attention_layernorm.weight"][5] += 0.2
    save_file(weights, file, {"format": "pt"})
    settings, refusal = packed(warm, tmp_path, model, kind)
    assert not refusal
    got, _ = served(ours(warm, tmp_path, settings, {}), kind)
    assert wanted is not None
    assert got is not None
    assert got != wanted


def test_forked_engines_answer_as_started_ones(
    warm: WarmVllm, tmp_path: Path, model_dir: Path
) -> None:
    """Stock and ours, each started as users do and forked: four equal answers."""
    kind = KINDS["LlamaForCausalLM"]
    model = kind.make(tmp_path / "model", model_dir)
    settings, refusal = packed(warm, tmp_path, model, kind)
    assert not refusal
    wanted, _ = served(stock(warm, tmp_path, model, {}), kind)
    assert wanted is not None
    assert served(ours(warm, tmp_path, settings, {}), kind)[0] == wanted
    for engine in (stock_vllm(tmp_path, model), Tensorserve(tmp_path, settings)):
        with engine:
            engine.wait_ready()
            assert matrix_asking.completions(engine) == wanted


def test_a_refusal_is_quoted_in_the_words_of_its_cause() -> None:
    """The exception at the root, not the one that says that another failed."""
    text = """(EngineCore pid=1) ERROR 11-30 [core.py:1] Traceback (most recent call last):
(EngineCore pid=1) ERROR 11-30 [core.py:1] NotImplementedError: no such kernel on CPU
(EngineCore pid=1) Exception: WorkerProc initialization failed due to an exception.
(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert last_words(text) == "NotImplementedError: no such kernel on CPU"
    text = """pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['X'] are not supported for now.
"""
    assert last_words(text) == "Value error, Model architectures ['X'] are not supported for now."
