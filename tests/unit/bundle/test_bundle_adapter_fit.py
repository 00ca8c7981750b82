"""Which adapters fit a model, by rank, modules, sizes and vocabulary?"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tensorserve.bundle.adapter_fit import BaseModel, misfit
from tensorserve.bundle.stand_ins import HeaderEntry

VOCABULARY, HIDDEN, OUT = 100, 16, 24
P = "base_model.model.model.layers.0.self_attn"


def entry(*shape: int, dtype: str = "BF16") -> HeaderEntry:
    return HeaderEntry(dtype, list(shape), 0)


TENSORS = {
    "model.embed_tokens.weight": entry(VOCABULARY, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": entry(OUT, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": entry(OUT, HIDDEN, dtype="I32"),
}


def base(**changes: object) -> BaseModel:
    values: dict[str, object] = {
        "names": frozenset({"model", "alias"}),
        "most_rank": 8,
        "vocabulary": VOCABULARY,
        "tensors": TENSORS,
    }
    return BaseModel(**(values | changes))  # type: ignore[arg-type]


def pair(module: str, rank: int = 8, into: int = HIDDEN, out: int = OUT) -> dict[str, list[int]]:
    return {f"{module}.lora_A.weight": [rank, into], f"{module}.lora_B.weight": [out, rank]}


Q = pair(f"{P}.q_proj")
FITTING: dict[str, Mapping[str, list[int]]] = {
    "one module": Q,
    "a transposed weight": pair(f"{P}.q_proj", into=OUT, out=HIDDEN),
    "a packed weight": Q | pair(f"{P}.k_proj", out=7),
    "experts": Q | pair("base_model.model.model.layers.0.mlp.experts.3.w1", into=5),
    "a tied head": Q | pair("base_model.model.lm_head", out=VOCABULARY),
    "other names": pair("base_model.model.layers.0.attention.wq"),
    "an embedding": Q
    | {
        "base_model.model.model.embed_tokens.lora_embedding_A": [8, VOCABULARY],
        "base_model.model.model.embed_tokens.lora_embedding_B": [HIDDEN, 8],
    },
    "the model's own embedding": Q | {"base_model.model.model.embed_tokens.weight": [100, 16]},
    "a classifier": Q | {"base_model.model.score.weight": [2, HIDDEN]},
}


@pytest.mark.parametrize("shapes", FITTING.values(), ids=FITTING.keys())
def test_it_fits(shapes: Mapping[str, list[int]]) -> None:
    """Also where names tell nothing: vLLM decides then."""
    assert misfit(shapes, 8, base(), "alias") is None
    assert misfit(shapes, 8, base(tensors=None), None) is None


UNFIT: dict[str, tuple[Mapping[str, list[int]], str]] = {
    "another size": (pair(f"{P}.q_proj", into=32), "24x32, the model's is 24x16"),
    "a layer too many": (
        Q | pair(P.replace("0", "9") + ".q_proj"),
        "layers.9.self_attn.q_proj, which the model does not have",
    ),
    "one matrix of two": ({f"{P}.q_proj.lora_A.weight": [8, HIDDEN]}, "one matrix of two"),
    "two ranks": (
        {f"{P}.q_proj.lora_A.weight": [8, 16], f"{P}.q_proj.lora_B.weight": [24, 4]},
        "of ranks 8 and 4",
    ),
    "another vocabulary": (
        Q | {"base_model.model.model.embed_tokens.lora_embedding_A": [8, 101]},
        "for 101 tokens, the model has 100",
    ),
    "a larger embedding of its own": (
        Q | {"base_model.model.model.embed_tokens.base_layer.weight": [101, HIDDEN]},
        "for 101 tokens",
    ),
    "a larger head": (Q | {"base_model.model.lm_head.weight": [101, HIDDEN]}, "for 101 tokens"),
}


@pytest.mark.parametrize(("shapes", "said"), UNFIT.values(), ids=UNFIT.keys())
def test_it_is_of_another_model(shapes: Mapping[str, list[int]], said: str) -> None:
    """vLLM would ignore layers and embeddings, and find sizes late."""
    found = misfit(shapes, 8, base())
    assert found is not None
    assert found.reason == "other_model"
    assert said in found.message


@pytest.mark.parametrize(("rank", "shapes"), [(9, Q), (8, pair(f"{P}.q_proj", rank=9))])
def test_its_rank_is_too_large(rank: int, shapes: Mapping[str, list[int]]) -> None:
    """By its configuration, or by its matrices."""
    found = misfit(shapes, rank, base())
    assert found is not None
    assert found.reason == "rank"
    assert "TENSORSERVE_VLLM_MAX_LORA_RANK" in found.message


def test_its_manifest_names_another_model() -> None:
    """Two models of one architecture have the same sizes."""
    found = misfit(Q, 8, base(), "model-2")
    assert found is not None
    assert found.reason == "other_model"
    assert "'model-2'" in found.message
