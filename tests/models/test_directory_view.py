"""What vLLM finds out from weight files in the model's directory, it finds out in ours as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import view_models
from running import Running, Tensorserve, stock_vllm
from test_models import PROMPTS, embeddings, pack


def complete(engine: Running) -> object:
    return engine.completions("model", PROMPTS)


def complete_in_4_bit(engine: Running) -> object:
    """None where vLLM's CPU build has no such kernels (without AVX-512): it becomes ready there
    all the same, and what it found out is in its log.
    """
    return complete(engine) if "avx512f" in Path("/proc/cpuinfo").read_text() else None


@dataclass(frozen=True)
class Kind:
    """A model; what vLLM must have found out; `flags` are vLLM's, by their variables' names."""

    make: Callable[[Path, Path], Path]
    shown: str
    """In vLLM's log."""
    ask: Callable[[Running], object] = complete
    flags: dict[str, str] = field(default_factory=dict)


KINDS = {
    "no-dtype": Kind(view_models.without_dtype, "dtype=torch.float16"),
    "gptq-in-part": Kind(
        view_models.gptq_in_part, "dtype=torch.float16", complete_in_4_bit, {"DTYPE": "half"}
    ),
    "awq-in-part": Kind(
        view_models.awq_in_part, "dtype=torch.float16", complete_in_4_bit, {"DTYPE": "half"}
    ),
    "mistrals-own-layout": Kind(view_models.mistral, "MistralForCausalLM"),
    "dense": Kind(view_models.dense, "", embeddings, {"MAX_MODEL_LEN": "256"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_answers_equal_those_of_stock_vllm(tmp_path: Path, model_dir: Path, name: str) -> None:
    """Text and log-probabilities, or vectors, to the last bit, from an encrypted bundle."""
    kind = KINDS[name]
    model = kind.make(tmp_path / "model", model_dir)
    stock = stock_vllm(tmp_path, model)
    for flag, value in kind.flags.items():
        stock.command += ["--" + flag.lower().replace("_", "-"), value]
    with stock:
        stock.wait_ready()
        assert kind.shown in stock.text
        wanted = kind.ask(stock)
    settings = pack(model, tmp_path)
    settings |= {f"TENSORSERVE_VLLM_{flag}": value for flag, value in kind.flags.items()}
    with Tensorserve(tmp_path, settings) as engine:
        engine.wait_ready()
        assert kind.shown in engine.text
        assert kind.ask(engine) == wanted
    if name == "dense":
        assert isinstance(wanted, list)
        assert {len(vector) for vector in wanted} == {64}


def test_a_dense_layer_is_served_from_layout_vllm_too(tmp_path: Path, model_dir: Path) -> None:
    """Its bundle holds vLLM's own parameters, of which the layer's are a part."""
    kind = KINDS["dense"]
    model = kind.make(tmp_path / "model", model_dir)
    limit = {"TENSORSERVE_VLLM_MAX_MODEL_LEN": "256"}
    answers = []
    for layout in ("hf", "vllm"):
        with Tensorserve(tmp_path, pack(model, tmp_path, layout) | limit) as engine:
            engine.wait_ready()
            answers.append(embeddings(engine))
    assert answers[0] == answers[1]
