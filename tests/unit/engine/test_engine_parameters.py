"""What the loader does with a file before and while it fills a model, without an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tensorserve.errors import ConfigurationError, CorruptError


@pytest.fixture(scope="module")
def loader() -> Any:
    """Imported late: it imports vLLM, which takes seconds."""
    from tensorserve.engine import parameters

    return parameters


class Tied(nn.Module):
    """Two names for one parameter, and a buffer that is born with a value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(2, 2))
        self.head = self.embed
        self.norm = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("table", torch.zeros(2), persistent=False)


def tensors(**changes: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ({"embed": torch.ones(2, 2), "norm": torch.ones(2)} | changes).items()


def test_a_file_in_vllms_layout_is_copied_in_place(loader: Any) -> None:
    """One name of tied parameters is enough; memory stays where it was."""
    model = Tied()
    before = model.embed.data_ptr()
    loader.copy_in_place(model, tensors())
    assert model.embed.data_ptr() == before
    assert torch.equal(model.head, torch.ones(2, 2))
    assert torch.equal(model.scale, torch.ones(1))


def test_two_tensors_for_one_memory_are_refused(loader: Any) -> None:
    """What `pack` wrote untied must not meet a tied model: the last one would win in silence."""
    both = {"embed": torch.ones(2, 2), "head": torch.zeros(2, 2), "norm": torch.ones(2)}
    loader.copy_in_place(Tied(), iter(both.items()))
    with pytest.raises(ConfigurationError, match="a tensor of its own for 'head'"):
        loader.copy_in_place(Tied(), iter(both.items()), once=True)


def test_buffers_of_no_state_dict_are_taken_too(loader: Any) -> None:
    """vLLM's own writer stores them: the tables of rotary embeddings."""
    model = Tied()
    loader.copy_in_place(model, tensors(table=torch.ones(2)))
    assert torch.equal(model.table, torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other": torch.ones(1)}, "does not have"),
        ({"norm": torch.ones(3)}, r"\(3,\)"),
        ({"norm": torch.ones(2, dtype=torch.float16)}, "float16"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    loader: Any, changes: dict[str, torch.Tensor], said: str
) -> None:
    """Another model, version, dtype or parallel size: refused, never broadcast or converted."""
    with pytest.raises(ConfigurationError, match=said):
        loader.copy_in_place(Tied(), tensors(**changes))


def test_a_parameter_that_the_file_lacks_ends_the_load(loader: Any) -> None:
    """The invariant: never ready with wrong weights."""
    with pytest.raises(CorruptError, match="norm"):
        loader.copy_in_place(Tied(), iter([("embed", torch.ones(2, 2))]))


class Strict(nn.Module):
    """Refuses names that it does not know, as vLLM's models do."""

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        known = {"embed": 1, "norm": 2}
        return {name for name, _ in weights if known[name]}


def test_a_tensor_that_the_model_refuses_is_named(loader: Any) -> None:
    """Which model, which tensor, and what vLLM said."""
    assert loader.give(Strict(), tensors()) == {"embed", "norm"}
    with pytest.raises(CorruptError, match=r"Strict: it refused 'other' \('other'\)"):
        loader.give(Strict(), tensors(other=torch.ones(1)))


def test_an_error_of_ours_within_a_load_stays_what_it_is(loader: Any) -> None:
    """It is no tensor that does not fit."""

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "embed", torch.ones(1)
        raise ConfigurationError("a test's")

    with pytest.raises(ConfigurationError, match="a test's"):
        loader.give(Strict(), broken())


def test_pages_are_found_in_advance_and_values_stay(loader: Any) -> None:
    """Of what is in host memory and in one piece; the rest is left to itself."""
    model = nn.Module()
    model.large = nn.Parameter(torch.arange(300_000.0))
    model.turned = nn.Parameter(torch.ones(300, 200).t(), requires_grad=False)
    model.elsewhere = nn.Parameter(torch.empty(5, device="meta"))
    model.empty = nn.Parameter(torch.empty(0))
    loader.populate_soon(model, frozenset(os.sched_getaffinity(0))).join(30)
    assert torch.equal(model.large, torch.arange(300_000.0))
    assert torch.equal(model.turned, torch.ones(200, 300))


def test_what_a_rank_holds_comes_once_without_computed_buffers(loader: Any) -> None:
    """Tied parameters under one name; buffers of no state dict only if the checkpoint set them."""
    model = Tied()
    before = loader.computed_buffers(model)
    assert list(before) == ["table"]
    assert set(loader.held_tensors(model, before)) == {"embed", "norm", "scale"}
    model.table.fill_(7)
    held = loader.held_tensors(model, before)
    assert set(held) == {"embed", "norm", "scale", "table"}
    again = Tied()
    loader.copy_in_place(again, iter(held.items()))
    assert torch.equal(again.table, model.table)


def test_what_no_file_can_hold_is_refused_by_name(loader: Any) -> None:
    """A parameter that never got data."""
    model = Tied()
    model.norm = nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(ConfigurationError, match="'norm' as a Tensor on meta"):
        loader.held_tensors(model, loader.computed_buffers(model))


def test_the_bytes_of_a_tensor_are_those_of_its_values_in_order(loader: Any) -> None:
    """However it lies in memory; a scalar too."""
    values = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert (
        bytes(loader.plain_bytes(values.t()).tolist()) == values.t().contiguous().numpy().tobytes()
    )
    assert loader.plain_bytes(torch.tensor(1.0)).shape == (4,)


def test_a_second_name_for_filled_memory_is_another_models(loader: Any) -> None:
    """Tied here, untied where it was packed: the second would overwrite the first."""
    two = iter([("embed", torch.ones(2, 2)), ("head", torch.zeros(2, 2)), ("norm", torch.ones(2))])
    with pytest.raises(ConfigurationError, match="a tensor of its own for 'head'"):
        loader.copy_in_place(Tied(), two, once=True)
