"""Which tensors does a safetensors file hold, and is its header consistent?

The safetensors format: https://github.com/huggingface/safetensors#format. Only headers are read
here, no tensor data.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.dtypes import ITEM_SIZES
from tensorserve.sources.local import LocalSource

DAMAGED_HINT = "Download the model again, and compare the file's SHA-256 with the publisher's."
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# The limit of the safetensors library.
_MAX_HEADER = 100_000_000
# The limit of a .tensors file, which counts dimensions in one byte.
_MAX_DIMENSIONS = 255
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
DTYPE_LABELS = {dtype: label for label, dtype in _DTYPES.items()}
"""torch's name of a dtype → safetensors' label."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; ``dtype`` is torch's name, offset and length are bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises CorruptError if the header is inconsistent or does not fit the file's size,
    ConfigurationError for a dtype that a .tensors file cannot hold, and the sources' errors.
    """

    def damaged(problem: str) -> CorruptError:
        return CorruptError(
            f"{path} is not a complete safetensors file: {problem}.", hint=DAMAGED_HINT
        )

    source = LocalSource(path)
    try:
        if source.read(0, min(len(LFS_POINTER), source.size)) == LFS_POINTER:
            raise CorruptError(
                f"{path} is a Git LFS pointer, not the weights.",
                hint="Download the files: `git lfs pull` in the model's directory.",
            )
        if source.size < 8:
            raise damaged(f"it has {source.size} bytes")
        (length,) = struct.unpack("<Q", source.read(0, 8))
        if length > min(_MAX_HEADER, source.size - 8):
            raise damaged(f"its header claims {length} bytes, the file has {source.size}")
        try:
            header = read_json(source.read(8, length))
        except ValueError as error:
            raise damaged(f"its header is not valid JSON ({error})") from error
    finally:
        source.close()
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        try:
            tensors.append(_stored(path, name, entry, 8 + length))
        except (TypeError, ValueError, KeyError) as error:
            raise damaged(f"tensor {name!r}: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.length))
    at = 8 + length
    for tensor in tensors:
        if tensor.offset != at:
            raise damaged(f"tensor {tensor.name!r} begins at byte {tensor.offset}, not at {at}")
        at += tensor.length
    if at != source.size:
        raise damaged(f"its header describes {at} bytes, the file has {source.size}")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    label, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
    ):
        raise ValueError("shape and offsets are not natural numbers")
    dtype = _DTYPES.get(label)
    if dtype is None:
        raise ConfigurationError(
            f"{path}: tensor {name!r} is of dtype {label}, which PyTorch does not have.",
            hint="A .tensors file cannot hold it; convert the model to another dtype.",
        )
    if label == "F4":
        # Two values in a byte: torch's last dimension counts bytes.
        if not shape or shape[-1] % 2:
            raise ValueError(f"shape {shape} of F4 does not fill whole bytes")
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
        raise ValueError(f"shape {shape} of {label} does not take {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, base + begin, end - begin)
