"""Host memory is used again, but never while anybody still holds it."""

from __future__ import annotations

import gc

import torch

from tensorserve.loading.buffer_pool import BufferPool

MIB = 1024**2


def test_memory_is_used_again_when_its_tensor_is_gone() -> None:
    """The same address: no fresh pages."""
    memory = BufferPool(keep=64 * MIB)
    first = memory.take(3 * MIB)
    address = first.data_ptr()
    del first
    assert memory.take(3 * MIB - 5).data_ptr() == address


def test_memory_of_a_tensor_that_somebody_holds_is_left_alone() -> None:
    """Any view keeps it, also one of another type."""
    memory = BufferPool(keep=64 * MIB)
    first = memory.take(2 * MIB)
    first.fill_(7)
    view = first.view(torch.bfloat16)[10:20].reshape(2, 5)
    bits = view.view(torch.int16).clone()
    address = first.data_ptr()
    del first
    gc.collect()
    others = [memory.take(2 * MIB) for _ in range(4)]
    assert address not in [other.data_ptr() for other in others]
    for other in others:
        other.fill_(9)
    assert torch.equal(view.view(torch.int16), bits)


def test_no_more_is_kept_than_asked_for() -> None:
    """What is too much is given back to the system."""
    memory = BufferPool(keep=4 * MIB)
    held = [memory.take(2 * MIB) for _ in range(8)]
    held.clear()
    memory.take(MIB)
    assert memory._kept <= 4 * MIB
