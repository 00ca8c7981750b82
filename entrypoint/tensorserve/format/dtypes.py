"""Which torch dtype does a dtype string in a .tensors file mean?

tensorizer writes numpy's array-protocol string (``<f4``). For dtypes that numpy lacks, it writes an
opaque numpy dtype of the same size, a NUL, and torch's name (``<V2\\0torch.bfloat16``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

OPAQUE_SEPARATOR = "\0"

# Bytes per element, by torch's name (torch.<name>). Sub-byte dtypes occupy whole bytes in torch.
ITEM_SIZES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}

_NUMPY_NAMES: dict[str, str] = {
    "|b1": "bool",
    "|u1": "uint8",
    "<u2": "uint16",
    "<u4": "uint32",
    "<u8": "uint64",
    "|i1": "int8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<c8": "complex64",
    "<c16": "complex128",
}

_OPAQUE_SIZES: dict[str, int] = {"|V1": 1, "<V2": 2, "<V4": 4, "<V8": 8}


class UnknownDtypeError(ValueError):
    """The dtype string is not one that tensorizer writes, or not a dtype of torch."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype: torch's ``name`` ("bfloat16"), bytes per element, and the string in the file."""

    name: str
    item_size: int
    raw: str


@lru_cache(maxsize=128)
def parse_dtype(raw: bytes) -> Dtype:
    """The dtype with the string ``raw`` in a file.

    Raises UnknownDtypeError for an unknown dtype, and for big-endian data.
    """
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        raise UnknownDtypeError(f"dtype {raw!r} is not text") from None
    carrier, separator, torch_name = text.partition(OPAQUE_SEPARATOR)
    if not separator:
        name = _NUMPY_NAMES.get(carrier)
        if name is None:
            raise UnknownDtypeError(f"dtype {text!r} is not known")
        return Dtype(name, ITEM_SIZES[name], text)
    module, _, name = torch_name.partition(".")
    size = ITEM_SIZES.get(name)
    if module != "torch" or size is None:
        raise UnknownDtypeError(f"opaque dtype {text!r} does not name a dtype of torch")
    if _OPAQUE_SIZES.get(carrier) != size:
        raise UnknownDtypeError(f"opaque dtype {text!r}: torch.{name} has {size} bytes an element")
    return Dtype(name, size, text)


@lru_cache(maxsize=128)
def raw_dtype(name: str) -> bytes:
    """The string in a file for torch's dtype ``name``, as tensorizer writes it.

    Raises UnknownDtypeError for a dtype that a file cannot hold.
    """
    for raw, known in _NUMPY_NAMES.items():
        if known == name:
            return raw.encode()
    for carrier, size in _OPAQUE_SIZES.items():
        if ITEM_SIZES.get(name) == size:
            return f"{carrier}{OPAQUE_SEPARATOR}torch.{name}".encode()
    raise UnknownDtypeError(f"dtype {name!r} cannot be stored")
