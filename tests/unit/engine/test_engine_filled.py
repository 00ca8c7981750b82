"""Which parameters may stay as they were born, and how the others are named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tensorserve.engine.memory_writes import Watch
from tensorserve.errors import CorruptError


@pytest.fixture(scope="module")
def filled() -> Any:
    """Imported late: it imports vLLM, which takes seconds."""
    from tensorserve.engine import filled

    return filled


def empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def valued(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=False)


def layer(parameters: Callable[[], dict[str, nn.Parameter]], **attributes: Any) -> nn.Module:
    """A layer of a model, of whatever parameters and attributes a test is about."""
    module = nn.Module()
    for name, parameter in parameters().items():
        module.register_parameter(name, parameter)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def experts(**changes: Any) -> SimpleNamespace:
    """What vLLM's FusedMoEConfig says of a layer of experts."""
    sizes = {
        "hidden_dim": 4,
        "hidden_dim_unpadded": 4,
        "intermediate_size_per_partition": 4,
        "intermediate_size_per_partition_unpadded": 4,
        "has_bias": False,
    }
    return SimpleNamespace(**sizes | changes)


def left(
    filled: Any,
    make: Callable[[], nn.Module],
    fill: Callable[[Any], object] = lambda _: None,
    reported: set[str] | None = None,
    *,
    draft: bool = False,
) -> list[str]:
    """The names of what is refused of a model with the layer `make` gives."""

    def whole() -> nn.Module:
        model = nn.Module()
        model.add_module("layer", make())
        return model

    watch = Watch()
    with watch.birth():
        model = whole()
    with watch.load(model):
        fill(model.layer)
    names = [u.name for u in filled.unfilled(watch, model, reported or set(), draft=draft)]
    if names:
        with pytest.raises(CorruptError, match=names[0]):
            filled.refuse_unfilled(watch, model, reported, draft=draft)
    else:
        filled.refuse_unfilled(watch, model, reported, draft=draft)
    return names


def test_a_part_of_a_fused_parameter_that_is_missing_is_refused(filled: Any) -> None:
    """Although the model says that it has loaded it: it has, the other parts."""
    make = lambda: layer(lambda: {"weight": empty(6, 4)}, quant_method=object())  # noqa: E731
    part = lambda it: it.weight.data[:4].fill_(1)  # noqa: E731
    assert left(filled, make, part, {"layer.weight"}) == ["layer.weight"]
    assert left(filled, make, lambda it: it.weight.data.fill_(1)) == []


def test_a_message_names_the_first_and_how_much_there_is(filled: Any) -> None:
    """And where the gap begins."""
    watch = Watch()
    with watch.birth():
        model = layer(lambda: {name: empty(4, 2) for name in "abcde"})
    with watch.load(model):
        model.a.data[:3].fill_(1)
    with pytest.raises(CorruptError) as caught:
        filled.refuse_unfilled(watch, model, set())
    assert "do not fill 5 of the 5 parameters of vLLM's Module: " in caught.value.message
    assert "'a' (75.0% filled, not at [3, 0]), 'b' (not filled)" in caught.value.message
    assert "and 2 more" in caught.value.message


def test_a_value_from_vllm_counts_only_where_the_model_says_so(filled: Any) -> None:
    """A norm is born as ones: without its tensor it would be served so."""
    make = lambda: layer(lambda: {"weight": valued(4)})  # noqa: E731
    assert left(filled, make) == ["layer.weight"]
    assert left(filled, make, reported={"layer.weight"}) == []


def test_a_part_of_a_scale_that_has_a_value_is_refused(filled: Any) -> None:
    """FP8's experts have scales of 1 until they are loaded: one of them missing is noticed."""
    make = lambda: layer(lambda: {"w2_weight_scale": valued(8)}, quant_method=object())  # noqa: E731
    part = lambda it: it.w2_weight_scale.data[:7].fill_(2)  # noqa: E731
    assert left(filled, make, part, {"layer.w2_weight_scale"}) == ["layer.w2_weight_scale"]


def test_what_vllm_pads_may_be_filled_in_part(filled: Any) -> None:
    """As much as it says, or some of each expert where experts' matrices are padded."""

    def counted() -> nn.Module:
        module = layer(lambda: {"w2_weight": empty(2, 4, 4)})
        module.w2_weight.weight_loader_numel = 2 * 3 * 4
        return module

    assert left(filled, counted, lambda it: it.w2_weight.data[:, :3].fill_(1)) == []
    assert left(filled, counted, lambda it: it.w2_weight.data[:, :2].fill_(1)) != []

    def padded() -> nn.Module:
        sizes = experts(hidden_dim_unpadded=3)
        return layer(lambda: {"w2_weight": empty(2, 4, 4)}, moe_config=sizes)

    assert left(filled, padded, lambda it: it.w2_weight.data[:, :3].fill_(1)) == []
    assert left(filled, padded, lambda it: it.w2_weight.data[0].fill_(1)) == ["layer.w2_weight"]


def test_what_no_checkpoint_needs_to_have_may_stay(filled: Any) -> None:
    """Scales of the cache, notes, biases and scales that vLLM drops; each with its reason there."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    no_bias = experts()
    kept_whole = SimpleNamespace(use_a16=True)
    nan = lambda: {"input_scale": nn.Parameter(torch.full((3,), torch.nan))}  # noqa: E731
    for make in (
        lambda: layer(lambda: {"k_scale": valued()}, quant_method=BaseKVCacheMethod(None)),
        lambda: layer(lambda: {"weight_shape": empty(2)}),
        lambda: layer(lambda: {"input_scale_ub": valued(1)}),
        lambda: layer(lambda: {"w13_bias": valued(2, 4)}, moe_config=no_bias),
        lambda: layer(lambda: {"w13_input_scale": empty(2)}, quant_method=kept_whole),
        lambda: layer(nan),
        lambda: layer(lambda: {"nothing": empty(0)}),
        lambda: layer(lambda: {"later": nn.parameter.UninitializedParameter()}),
    ):
        assert left(filled, make) == []
    has_bias = experts(has_bias=True)
    biased = lambda: layer(lambda: {"w13_bias": valued(2, 4)}, moe_config=has_bias)  # noqa: E731
    assert left(filled, biased) == ["layer.w13_bias"]


def test_a_draft_may_lack_the_embedding_and_the_head(filled: Any) -> None:
    """vLLM gives it those of the model that it drafts for; and nothing else."""

    def make() -> nn.Module:
        module = nn.Module()
        for name in ("embed_tokens", "lm_head", "norm"):
            module.add_module(name, layer(lambda: {"weight": empty(2)}))
        return module

    assert left(filled, make, draft=True) == ["layer.norm.weight"]
    assert len(left(filled, make)) == 3


def test_tied_parameters_are_filled_by_either_name(filled: Any) -> None:
    """They are one."""

    def make() -> nn.Module:
        module = layer(lambda: {"embed": empty(4)})
        module.head = module.embed
        return module

    assert left(filled, make, lambda it: it.head.data.fill_(1)) == []
    assert left(filled, make) == ["layer.embed"]


def test_a_layer_that_waits_for_its_last_tensor_is_refused(filled: Any) -> None:
    """Online quantization keeps layers on the device "meta" until all of their tensors came."""

    def make() -> nn.Module:
        return layer(lambda: {"weight": nn.Parameter(torch.empty(4, 2, device="meta"))})

    def finish(it: Any) -> None:
        it.weight = nn.Parameter(torch.ones(4, 2))

    assert left(filled, make, finish) == []
    assert left(filled, make, lambda it: it.weight.data[:2].fill_(1)) == ["layer.weight"]
    assert left(filled, make) == ["layer.weight"]
