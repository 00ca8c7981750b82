"""What tensors does a new .tensors file get, and how are their bytes read piece by piece?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tensorserve.format import TensorSpec
from tensorserve.packing.checkpoint import Checkpoint, CheckpointReader
from tensorserve.packing.dtype_conversion import Casting, Read


@dataclass(frozen=True)
class TensorsSource:
    """The tensors of one file, in file order.

    `reading` is a context with the function that reads their bytes; its resources are released at
    the end.
    """

    specs: tuple[TensorSpec, ...]
    reading: Callable[[], AbstractContextManager[Read]]


def from_checkpoint(checkpoint: Checkpoint, casting: Casting | None = None) -> TensorsSource:
    """A checkpoint's tensors. With a `casting`, `checkpoint` is its converted checkpoint."""

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
