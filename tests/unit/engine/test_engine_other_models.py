"""Which model vLLM asks the loader for: the bundle's, or one with a directory of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def loader() -> Any:
    """Imported late: it imports vLLM, which takes seconds."""
    from tensorserve.engine import other_models

    return other_models


def config(model: str, runner: str = "generate", kind: str = "llama") -> Any:
    """As much of vLLM's ModelConfig as is looked at."""
    hf_config = SimpleNamespace(model_type=kind)
    return SimpleNamespace(model=model, model_weights="", runner_type=runner, hf_config=hf_config)


SERVED = config("/state/model")
DRAFT = config("/models/draft", "draft")
MTP = config("/state/model", "draft", "deepseek_mtp")


def engine(model: Any, target: Any = None) -> Any:
    """A VllmConfig; `target`: the served model, where something speculates."""
    speculative = None if target is None else SimpleNamespace(target_model_config=target)
    return SimpleNamespace(model_config=model, speculative_config=speculative)


@pytest.mark.parametrize(
    ("vllm_config", "asked", "own"),
    [
        (engine(SERVED), SERVED, True),
        (engine(SERVED, SERVED), SERVED, True),
        # EAGLE and Medusa: the served model's VllmConfig, or one with the draft's.
        (engine(SERVED, SERVED), DRAFT, False),
        (engine(DRAFT, SERVED), DRAFT, False),
        # MTP and DSpark: layers of the same checkpoint.
        (engine(SERVED, SERVED), MTP, True),
        (engine(MTP, SERVED), MTP, True),
    ],
)
def test_the_model_that_is_asked_for_is_known(
    loader: Any, vllm_config: Any, asked: Any, own: bool
) -> None:
    """By its directory, in each form in which vLLM 0.32.0 asks."""
    assert loader.is_the_bundles(vllm_config, asked, "s3://bucket/model") is own


def test_a_bundle_may_be_named_by_its_own_directory(loader: Any) -> None:
    """Where MTP's "model" is given though it need not be."""
    mtp = config("/models/bundle", "draft")
    vllm_config = engine(SERVED, SERVED)
    assert loader.is_the_bundles(vllm_config, mtp, "/models/bundle/model.tensors")
    assert not loader.is_the_bundles(vllm_config, mtp, "/models/other")


def test_a_draft_is_loaded_by_as_many_ranks_as_the_model(loader: Any) -> None:
    """What vLLM gives a draft of parallelism has no replicas in it."""
    every, drafts = object(), object()
    speculative = SimpleNamespace(target_model_config=SERVED, target_parallel_config=every)
    for asked, given, found in ((DRAFT, drafts, every), (SERVED, every, every)):
        vllm_config = SimpleNamespace(
            model_config=asked, parallel_config=given, speculative_config=speculative
        )
        assert loader.ranks_config(vllm_config, asked) is found
    alone = SimpleNamespace(model_config=SERVED, parallel_config=every, speculative_config=None)
    assert loader.ranks_config(alone, SERVED) is every


def test_the_packed_draft_is_known_by_its_directory(loader: Any) -> None:
    """Whatever stands beside it has a directory of its own, as ever."""
    from tensorserve.launch.context import PackedDraft, Shard

    packed = PackedDraft("/models/draft", Shard("s3://b/m/draft/d/model.tensors", None, 1))
    assert loader.is_packed(DRAFT, packed)
    assert not loader.is_packed(SERVED, packed)
    assert not loader.is_packed(config("/models/draft-2", "draft"), packed)
    assert not loader.is_packed(DRAFT, None)


def test_a_draft_is_not_the_served_model(loader: Any) -> None:
    """Whether it has a directory or not; also what takes hidden states out of the model."""
    assert not loader.is_a_draft(SERVED)
    assert loader.is_a_draft(DRAFT)
    assert loader.is_a_draft(MTP)
    assert loader.is_a_draft(config("/state/model", kind="extract_hidden_states"))


def test_another_model_is_loaded_as_vllm_loads_any(
    loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our load format and options, which have no meaning there."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    asked: list[Any] = []

    def load_model(self: Any, *given: Any) -> nn.Module:
        asked.append((self.load_config, *given))
        return nn.Module()

    monkeypatch.setattr(DefaultModelLoader, "load_model", load_model)
    ours = LoadConfig(load_format="tensorizer", model_loader_extra_config={"tensorserve": "x"})
    vllm_config = engine(SERVED, SERVED)
    loader.load_other(ours, vllm_config, DRAFT, "draft_model")
    ((used, *given),) = asked
    assert (used.load_format, used.model_loader_extra_config) == ("auto", {})
    assert given == [vllm_config, DRAFT, "draft_model"]
    assert ours.load_format == "tensorizer"


def test_what_a_model_reads_beside_its_checkpoint_is_read_too(
    loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultravox names its audio tower's own repository."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def read(_: Any, source: Any) -> Any:
        yield f"{source.prefix}weight", torch.ones(1)

    monkeypatch.setattr(DefaultModelLoader, "_get_weights_iterator", read)
    ours = LoadConfig(load_format="tensorizer")
    model = nn.Module()
    assert list(loader.beside_the_checkpoint(ours, model)) == []
    model.secondary_weights = [DefaultModelLoader.Source("/tower", None, prefix="audio.")]
    assert [name for name, _ in loader.beside_the_checkpoint(ours, model)] == ["audio.weight"]
