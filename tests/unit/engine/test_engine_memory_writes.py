"""What of a module's memory torch has written, to the byte, however it was done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tensorserve.engine.memory_writes import Watch, first_index, length, missing, region


class Layer(nn.Module):
    """A parameter of each kind that vLLM's layers are born with."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def made(make: Callable[[], nn.Module]) -> tuple[Watch, nn.Module]:
    watch = Watch()
    with watch.birth():
        module = make()
    return watch, module


def on_a_device(fill: Callable[[], object]) -> None:
    """vLLM loads within such a context: a mode of torch's, above ours."""
    with torch.device("cpu"):
        fill()


def bytes_left(watch: Watch, tensor: torch.Tensor) -> int:
    memory = watch.known(tensor)
    assert memory is not None
    return length(missing(tensor, memory.loaded))


@pytest.mark.parametrize(
    ("fill", "left"),
    [
        (lambda w: w.data.copy_(torch.ones(6, 4)), 0),
        (lambda w: w.data.narrow(0, 0, 4).copy_(torch.ones(4, 4)), 2 * 4 * 4),
        (lambda w: w.data[:, 1:3].fill_(1), 6 * 2 * 4),
        (lambda w: w.data.t().copy_(torch.ones(4, 6)), 0),
        (lambda w: w.data.view(torch.uint8).zero_(), 0),
        (lambda w: w.data.view(-1)[::2].fill_(1), 6 * 2 * 4),
        (lambda w: w.data[2].normal_(), 5 * 4 * 4),
        (lambda w: [w.data.narrow(1, c, 1).fill_(1) for c in range(4)], 0),
        (lambda w: [w.data.narrow(1, c, 1).fill_(1) for c in (0, 1, 3)], 6 * 4),
        # Twice the same is not all of it.
        (lambda w: [w.data.narrow(0, 0, 3).fill_(1) for _ in range(2)], 3 * 4 * 4),
        (lambda w: [w.data[0:4].fill_(1), w.data[2:6].fill_(1)], 0),
        (lambda w: w.data.index_copy_(0, torch.tensor([1]), torch.ones(1, 4)), 0),
        (lambda w: torch.add(w.data, 1, out=w.data), 0),
        (lambda w: torch.ops.aten.copy_.default(w.data, torch.ones(6, 4)), 0),
        (lambda w: torch._foreach_copy_([w.data[0], w.data[1]], [torch.ones(4)] * 2), 4 * 4 * 4),
        (lambda w: w.data.unbind(0)[1].copy_(torch.ones(4)), 5 * 4 * 4),
        (lambda w: w.data.__setitem__(slice(0, 2), torch.ones(2, 4)), 4 * 4 * 4),
        (lambda w: on_a_device(lambda: w.data[1:3].copy_(torch.ones(2, 4))), 4 * 4 * 4),
        (lambda w: w.data.sum(), 6 * 4 * 4),
    ],
)
@pytest.mark.parametrize("every_operation", [True, False])
def test_what_is_left_is_known_to_the_byte(
    fill: Callable[[torch.Tensor], object], left: int, every_operation: bool
) -> None:
    """By slices, columns, transposed, of another dtype, one over the other."""
    watch, module = made(lambda: Layer(6, 4))
    with watch.load(module, every_operation=every_operation):
        fill(module.weight)
    assert bytes_left(watch, module.weight) == left


def test_writes_below_torchs_functions_are_seen_if_asked_for() -> None:
    """A model that vLLM does not bring may fill its parameters so."""
    watch, module = made(lambda: Layer(6, 4))
    with watch.load(module), torch._C.DisableTorchFunction():
        module.weight.data.copy_(torch.ones(6, 4))
    assert bytes_left(watch, module.weight) == 0


def test_one_of_many_experts_is_found() -> None:
    """By its number, of a parameter that holds them all, each in two parts side by side."""
    watch, module = made(lambda: Layer(64, 8, 6, dtype=torch.float16))
    with watch.load(module):
        for expert in range(64):
            module.weight.data[expert].narrow(1, 0, 3).copy_(torch.ones(8, 3))
            if expert != 37:
                module.weight.data[expert].narrow(1, 3, 3).copy_(torch.ones(8, 3))
    memory = watch.known(module.weight)
    assert memory is not None
    left = missing(module.weight, memory.loaded)
    assert length(left) == 8 * 3 * 2
    assert first_index(module.weight, left) == [37, 0, 3]


@pytest.mark.parametrize(
    ("birth", "valueless"),
    [
        (lambda: torch.empty(4), True),
        (lambda: torch.empty_like(torch.zeros(4)), True),
        (lambda: torch.zeros(2).new_empty(4), True),
        (lambda: torch.empty(4).to(torch.float16), True),
        (lambda: torch.empty(4).copy_(torch.empty(4)), True),
        (lambda: torch.full((4,), torch.finfo(torch.float32).min), True),
        (lambda: torch.zeros(4), False),
        (lambda: torch.ones_like(torch.empty(4)), False),
        (lambda: torch.tensor([1.0, 2.0]), False),
        (lambda: torch.empty(4).normal_(), False),
        (lambda: torch.rand(4), False),
        (lambda: torch.empty(4, device="meta"), True),
    ],
)
def test_memory_without_a_value_is_told_from_a_value(
    birth: Callable[[], torch.Tensor], valueless: bool
) -> None:
    """vLLM's mark for a scale that is still to come is no value."""

    def make() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(birth(), requires_grad=False)
        return module

    watch, module = made(make)
    with watch.load(module):
        pass
    memory = watch.known(module.weight)
    assert memory is not None
    assert (memory.born == set()) is valueless


def test_vllms_mark_in_an_empty_scale_is_no_value() -> None:
    """`scale[:] = torch.finfo(torch.float32).min`; another value would be one."""

    def make() -> nn.Module:
        module = Layer(3)
        module.weight.data[:] = torch.finfo(torch.float32).min
        module.other = nn.Parameter(torch.empty(3), requires_grad=False)
        module.other.data[:] = -1.0
        return module

    watch, module = made(make)
    with watch.load(module):
        pass
    marked, other = watch.known(module.weight), watch.known(module.other)
    assert marked is not None
    assert other is not None
    assert marked.born == set()
    assert other.born == {region(module.other)}


def test_what_a_load_puts_in_a_parameters_place_is_not_counted() -> None:
    """`param.data = loaded`: made by the load, and by what is not torch (a reader's memory)."""
    watch, module = made(lambda: Layer(4))
    with watch.load(module):
        module.weight.data = torch.ones(4)
    assert watch.known(module.weight) is None


def test_memory_that_torch_reuses_is_not_taken_for_the_old() -> None:
    """A storage's number is not given away while it is known."""
    watch = Watch()
    with watch.birth():
        for _ in range(100):
            torch.empty(1000)
        module = nn.Linear(10, 100)
    with watch.load(module):
        pass
    memory = watch.known(module.weight)
    assert memory is not None
    assert not len(missing(module.weight, (memory.born or set()) | memory.loaded))


def test_tensors_of_other_kinds_are_let_be() -> None:
    """Scalars, empty ones, expanded ones, parameters without a shape."""
    watch, module = made(lambda: Layer())
    module.later = nn.parameter.UninitializedParameter()
    assert watch.known(module.later) is None
    with watch.load(module):
        module.weight.data.fill_(1)
        torch.empty(0).fill_(1)
        torch.empty(3, 0, 2).zero_()
    assert bytes_left(watch, module.weight) == 0
    assert region(torch.empty(1).expand(5)).run == 4
