"""How does `pack --dtype` convert floating-point weights to another dtype, piece by piece?

The bundle's config.json gets the new dtype too, because vLLM reads the model's dtype there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError
from tensorserve.format.dtypes import ITEM_SIZES
from tensorserve.format.safetensors import StoredTensor
from tensorserve.packing.checkpoint import Checkpoint

DTYPES = ("bfloat16", "float16", "float32")
_FROM = frozenset({*DTYPES, "float64"})
_CONFIG = "config.json"
# transformers 5 writes the first key, older versions write the second.
_KEYS = ("dtype", "torch_dtype")

# (tensor's name, first byte of it, buffer to fill)
Read = Callable[[str, int, memoryview], None]


class Casting:
    """The conversion of one checkpoint's tensors and configuration to another dtype.

    `stored` is the checkpoint on disk, `checkpoint` the converted one.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str) -> None:
        """Raises ConfigurationError for an unknown `dtype`, a quantized model, or a config.json
        that cannot be read."""
        if dtype not in DTYPES:
            raise ConfigurationError(
                f"--dtype {dtype!r} is unknown.", hint=f"Use one of {', '.join(DTYPES)}."
            )
        self.dtype = dtype
        self.stored = checkpoint
        self._stored = {tensor.name: tensor for tensor in checkpoint.tensors}
        try:
            self._config = read_json((checkpoint.directory / _CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{checkpoint.directory / _CONFIG} could not be read: {error}.",
                hint="--dtype changes this file: download the model again, or leave --dtype out.",
            ) from error
        quantized = isinstance(self._config, dict) and self._config.get("quantization_config")
        if quantized or not isinstance(self._config, dict):
            raise ConfigurationError(
                f"{checkpoint.directory} is quantized: the quantization method needs the dtypes "
                "that its weights have.",
                hint="Leave --dtype out.",
            )
        self.checkpoint = replace(
            checkpoint,
            tensors=tuple(self._cast(tensor) for tensor in checkpoint.tensors),
            files=checkpoint.files | {_CONFIG: len(self.config())},
        )

    def config(self) -> bytes:
        """The content of config.json with the new dtype, in nested configurations too."""
        return (json.dumps(_with_dtype(self._config, self.dtype), indent=2) + "\n").encode()

    def dtype_of(self, dtype: str) -> str:
        """The dtype that a tensor of `dtype` is converted to."""
        return self.dtype if dtype in _FROM else dtype

    def reader(self, read: Read) -> Read:
        """A function like `read`, which reads stored bytes, for the converted bytes.

        It raises ConfigurationError if a finite value would become infinite.
        """

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
                    hint="Leave --dtype out, or use bfloat16.",
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
