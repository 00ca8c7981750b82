"""Where do the tensors of a new .tensors file come from, and how are they read piece by piece?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tensorserve.casting import Casting
from tensorserve.checkpoint import Checkpoint, CheckpointReader
from tensorserve.format import TensorSpec

# (tensor's name, first byte of it, buffer to fill)
Read = Callable[[str, int, memoryview], None]


@dataclass(frozen=True)
class TensorsSource:
    """The tensors of one file, in its order; `reading` gives what reads their bytes."""

    specs: tuple[TensorSpec, ...]
    reading: Callable[[], AbstractContextManager[Read]]


def from_checkpoint(checkpoint: Checkpoint, casting: Casting | None = None) -> TensorsSource:
    """A checkpoint's tensors, converted where there is a `casting` (which holds `checkpoint`)."""

    @contextmanager
    def reading() -> Iterator[Read]:
        reader = CheckpointReader(checkpoint if casting is None else casting.stored)
        try:
            yield reader.read_into if casting is None else casting.reader(reader.read_into)
        finally:
            reader.close()

    return TensorsSource(
        tuple(TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors),
        reading,
    )
