"""What does a Hugging Face directory hold: which tensors in which safetensors files, which others?

The safetensors format: https://github.com/huggingface/safetensors#format. Only headers are read
here; tensors are read piece by piece by whoever wants them. Pickles are never opened.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tensorserve.artifacts import MAX_FILE_BYTES, MAX_TOTAL_BYTES, WEIGHT_SUFFIXES
from tensorserve.bounded_json import read_json
from tensorserve.bundle_names import leaves_bundle
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.dtypes import ITEM_SIZES
from tensorserve.manifest import MANIFEST
from tensorserve.sources.local import LocalSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The limit of the safetensors library itself.
_MAX_HEADER = 100_000_000
# What a .tensors file can say of a shape.
_MOST_DIMENSIONS = 255
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
DTYPE_LABELS = {dtype: label for label, dtype in _DTYPES.items()}
"""torch's name → safetensors' own."""
_DAMAGED_HINT = "Download the model again, and compare the file's SHA-256 with the publisher's."
# Not needed to serve. Licences travel with the model.
_LEFT_OUT_SUFFIXES = (".py", ".md", ".index.json", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file; ``dtype`` is torch's name, offset and length are bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, before it is packed."""

    directory: Path
    tensors: tuple[StoredTensor, ...]  # in the order of the files, so that reading is sequential
    files: dict[str, int]  # the small files to take along: relative name → bytes
    left_out: tuple[str, ...]  # what is not taken along, weights of other formats included


def read_checkpoint(source: Path) -> Checkpoint:
    """Looks at `source`: a directory, or one .safetensors file with the rest beside it.

    Raises ConfigurationError if there is no model, or only pickles; CorruptError if a file is
    damaged or missing; PermissionDeniedError.
    """
    if not source.exists():
        raise ConfigurationError(f"{source} does not exist.", hint="Is the volume mounted?")
    directory = source if source.is_dir() else source.parent
    paths, owner = _weight_files(source)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_safetensors(path):
            if owner.get(tensor.name, path.name) != path.name:
                continue  # the index gives the name to another file
            if tensor.name in tensors:
                raise CorruptError(
                    f"Tensor {tensor.name!r} is in {tensors[tensor.name].path.name} and in "
                    f"{path.name}.",
                    hint=f"An {INDEX_NAME} says which is meant; or leave one of them out.",
                )
            tensors[tensor.name] = tensor
    for name in owner:
        if name not in tensors:
            raise CorruptError(
                f"{directory / INDEX_NAME} promises tensor {name!r} in {owner[name]}, "
                "which does not have it.",
                hint=_DAMAGED_HINT,
            )
    if not tensors:
        raise ConfigurationError(f"The safetensors files in {directory} hold no tensors.")
    files, left_out = _small_files(directory, {path.name for path in paths})
    if "config.json" not in files and "params.json" not in files:
        raise ConfigurationError(
            f"{directory} has no config.json.",
            hint="vLLM needs the model's configuration and tokenizer: pack the whole directory "
            "that save_pretrained() writes, or that `hf download` fetches.",
        )
    return Checkpoint(directory, tuple(tensors.values()), files, left_out)


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their data.

    Raises CorruptError if its header contradicts itself or the file's size, ConfigurationError for
    a dtype that a .tensors file cannot hold.
    """

    def damaged(problem: str) -> CorruptError:
        return CorruptError(
            f"{path} is not a whole safetensors file: {problem}.", hint=_DAMAGED_HINT
        )

    source = LocalSource(path)
    try:
        if source.size < 8:
            raise damaged(f"it has {source.size} bytes")
        (length,) = struct.unpack("<Q", source.read(0, 8))
        if length > min(_MAX_HEADER, source.size - 8):
            raise damaged(f"its header claims {length} bytes, the file has {source.size}")
        try:
            header = read_json(source.read(8, length))
        except ValueError as error:
            raise damaged("its header is not JSON that can be believed") from error
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


class CheckpointReader:
    """Reads bytes of stored tensors, in any number of threads.

    A file that changes meanwhile is a CorruptError.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
        self._sources: dict[Path, LocalSource] = {}
        self._opening = threading.Lock()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` of tensor `name`."""
        tensor = self._tensors[name]
        with self._opening:
            if tensor.path not in self._sources:
                self._sources[tensor.path] = LocalSource(tensor.path)
            source = self._sources[tensor.path]
        source.read_into(tensor.offset + start, buffer)

    def close(self) -> None:
        """Closes the files."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    label, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
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
        # Two values share a byte: torch counts the bytes.
        if not shape or shape[-1] % 2:
            raise ValueError(f"shape {shape} of F4 does not fill whole bytes")
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(shape) * ITEM_SIZES[dtype] != end - begin:
        raise ValueError(f"shape {shape} of {label} does not take {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, base + begin, end - begin)


def _weight_files(source: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that make the model, and {tensor: file} where an index says so."""
    if not source.is_dir():
        if source.suffix != ".safetensors":
            _refuse(source, [source.name])
        return [source], {}
    index = source / INDEX_NAME
    if index.exists():
        owner = _read_index(index)
        names = sorted(set(owner.values()))
        missing = [name for name in names if not (source / name).is_file()]
        if missing:
            raise CorruptError(
                f"{len(missing)} of {len(names)} weight files of {source} are missing: "
                f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}.",
                hint="Download the model again; an interrupted download leaves files out.",
            )
        return [source / name for name in names], owner
    if (source / SINGLE_NAME).exists():
        return [source / SINGLE_NAME], {}
    found = sorted(path for path in source.glob("*.safetensors") if path.is_file())
    if not found:
        _refuse(source, [path.name for path in source.iterdir()])
    return found, {}


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_HEADER:
            raise ValueError(f"it has more than {_MAX_HEADER} bytes")
        owner = read_json(path.read_bytes())["weight_map"]
        for tensor, name in owner.items():
            if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
                raise ValueError(f"tensor {tensor!r} is in {name!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path} is not a weight index: {error}.", hint=_DAMAGED_HINT) from error
    assert isinstance(owner, dict)
    return owner


def _refuse(source: Path, names: list[str]) -> None:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ConfigurationError(
            f"{source} has its weights as pickles only ({pickles[0]}): opening one runs whatever "
            "code is in it, so that is never done here.",
            hint="Fetch the safetensors version of the model, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW).",
        )
    raise ConfigurationError(
        f"{source} has no safetensors file.",
        hint="Give the directory of a Hugging Face model (config.json, *.safetensors, tokenizer).",
    )


def _small_files(directory: Path, weights: set[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    files: dict[str, int] = {}
    left_out: list[str] = []
    for root, folders, names in os.walk(directory):
        # .git, .cache and the like. Links to files are followed: a hub cache is made of them.
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file_name in sorted(names):
            path = Path(root, file_name)
            name = str(PurePosixPath(path.relative_to(directory)))
            if file_name.startswith(".") or name in weights or not path.is_file():
                continue
            size = path.stat().st_size
            taken = not (
                name.endswith((*WEIGHT_SUFFIXES, *PICKLE_SUFFIXES))
                or name.lower().endswith(_LEFT_OUT_SUFFIXES)
                or name == MANIFEST
                or leaves_bundle(name)  # no manifest may name it
                or size > MAX_FILE_BYTES
            )
            if taken:
                files[name] = size
            else:
                left_out.append(name)
    if sum(files.values()) > MAX_TOTAL_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise ConfigurationError(
            f"The files beside the weights in {directory} take {sum(files.values())} bytes, more "
            f"than a start accepts ({MAX_TOTAL_BYTES}); the largest is {largest}.",
            hint="Move what vLLM does not need out of the directory.",
        )
    return files, tuple(left_out)
