"""`pack --dtype`: floating-point weights in another dtype, converted piece by piece.

The bundle's config.json says so too: vLLM takes the model's dtype from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.checkpoint import Checkpoint, StoredTensor
from tensorserve.errors import ConfigurationError
from tensorserve.format.dtypes import ITEM_SIZES

DTYPES = ("bfloat16", "float16", "float32")
_FROM = frozenset({*DTYPES, "float64"})
_CONFIG = "config.json"
# transformers 5 writes the first, older ones the second.
_KEYS = ("dtype", "torch_dtype")

# (tensor's name, first byte of it, buffer to fill)
Read = Callable[[str, int, memoryview], None]


class Casting:
    """What becomes of one checkpoint: its tensors and its configuration in another dtype.

    `stored` is the checkpoint as it is, `checkpoint` as it will be.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        """Raises ConfigurationError where that would not be the same model any more."""
        if dtype not in DTYPES:
            raise ConfigurationError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        self.dtype = dtype
        self.stored = checkpoint
        self._stored = {tensor.name: tensor for tensor in checkpoint.tensors}
        try:
            self._config = read_json((checkpoint.directory / _CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{checkpoint.directory / _CONFIG} could not be read: {error}.",
                hint="--dtype has to change it.",
            ) from error
        quantized = isinstance(self._config, dict) and self._config.get("quantization_config")
        if quantized or not isinstance(self._config, dict):
            raise ConfigurationError(
                f"{checkpoint.directory} is quantized: its weights are of the dtypes that the "
                "quantization needs.",
                hint="Leave --dtype out.",
            )
        self.checkpoint = replace(
            checkpoint,
            tensors=tuple(self._cast(tensor) for tensor in checkpoint.tensors),
            files=checkpoint.files | {_CONFIG: len(self.config())},
        )

    def config(self) -> bytes:
        """config.json with the dtype that its model has now, nested ones too."""
        return (json.dumps(_with_dtype(self._config, self.dtype), indent=2) + "\n").encode()

    def reader(self, read: Read) -> Read:
        """`read` of stored bytes → the same of converted ones."""

        def converted(name: str, start: int, buffer: memoryview) -> None:
            import torch

            stored = self._stored[name]
            if not self._is_cast(stored):
                read(name, start, buffer)
                return
            had, wanted = ITEM_SIZES[stored.dtype], ITEM_SIZES[self.dtype]
            source = bytearray(len(buffer) // wanted * had)
            read(name, start // wanted * had, memoryview(source))
            values = torch.frombuffer(source, dtype=getattr(torch, stored.dtype))
            target = torch.frombuffer(buffer, dtype=getattr(torch, self.dtype))
            target.copy_(values)
            if not torch.isfinite(target).all() and torch.isfinite(values).all():
                raise ConfigurationError(
                    f"Tensor {name!r} has values that {self.dtype} cannot hold: they would become "
                    "infinite.",
                    hint="Leave --dtype out, or take bfloat16.",
                )

        return converted

    def _is_cast(self, tensor: StoredTensor) -> bool:
        return tensor.dtype in _FROM and tensor.dtype != self.dtype and tensor.length > 0

    def _cast(self, tensor: StoredTensor) -> StoredTensor:
        if not self._is_cast(tensor):
            return tensor
        length = tensor.length // ITEM_SIZES[tensor.dtype] * ITEM_SIZES[self.dtype]
        return replace(tensor, dtype=self.dtype, length=length)


def _with_dtype(value: Any, dtype: str, *, top: bool = True) -> Any:
    if not isinstance(value, dict):
        return value
    changed = {
        name: dtype if name in _KEYS else _with_dtype(content, dtype, top=False)
        for name, content in value.items()
    }
    if top and not changed.keys() & set(_KEYS):
        changed["torch_dtype"] = dtype
    return changed
