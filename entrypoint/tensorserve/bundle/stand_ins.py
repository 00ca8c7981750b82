"""How are stand-ins made: safetensors files with a header and no data, which vLLM reads?

Before it calls a loader, vLLM reads the headers of the safetensors files beside config.json: for
the dtype, the quantized layers, the presence of an lm_head, and Mistral's repository format
(launch/directory_reads.py). A stand-in has the names, dtypes and shapes of the model's own files,
with offsets of absent data: any safetensors reader raises an error when it reads a tensor from it.

`pack` writes stand-ins into the bundle, one for each kind of file that vLLM distinguishes. For a
bundle without them, a start makes one from the index of the .tensors file.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.bundle.download import STAND_IN_SUFFIX
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.layout import is_rank_layout, is_vllm_layout, loadable, module_name
from tensorserve.errors import CorruptError
from tensorserve.format import FileIndex
from tensorserve.format.dtypes import ITEM_SIZES
from tensorserve.format.safetensors import DTYPE_LABELS
from tensorserve.sources.local import LocalSource

# Marks a Mistral repository: vllm/transformers_utils/repo_utils.py (0.32.0), is_mistral_model_repo.
MISTRALS = "consolidated*.safetensors"
SINGLE_NAME, CONSOLIDATED = "model.safetensors", "consolidated.safetensors"
# A tensor that only checkpoints in Mistral's own format have.
_MISTRALS_EMBEDDING = "tok_embeddings.weight"
_DTYPES = {label: dtype for dtype, label in DTYPE_LABELS.items()}
# Two values in a byte: torch's last dimension counts bytes, that of safetensors counts values.
_PACKED_FP4 = "F4"
# The limit of the safetensors library itself.
_MAX_HEADER = 100_000_000

# torch's name of a dtype → the name of the dtype that it is converted to
Cast = Callable[[str], str]


@dataclass(frozen=True)
class StandIn:
    """A file for the model directory: `name` relative to it, and its content."""

    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor in a safetensors header: safetensors' dtype label and shape, `length` in bytes."""

    dtype: str
    shape: list[int]
    length: int


@dataclass(frozen=True)
class _Header:
    tensors: dict[str, HeaderEntry]
    metadata: dict[str, str] | None


def stand_ins_of(source: Path, weights: Iterable[str], cast: Cast | None = None) -> list[StandIn]:
    """The stand-ins for the model at `source`, a directory or one safetensors file.

    They cover all safetensors files of the directory, because vLLM reads all headers, also of
    files that it does not load. `weights` are the names of the files that it loads: a tensor of
    theirs takes precedence over one of the same name elsewhere. `cast` is the conversion of
    `--dtype`. Files without a valid safetensors header are left out.
    """
    if not source.is_dir():
        return _merged({source.name: _read_header(source)}, cast)
    paths = [path for path in source.glob(f"*{STAND_IN_SUFFIX}") if path.is_file()]
    root = {path.name: _read_header(path) for path in paths}
    made_of = set(weights)
    ordered = {name: root[name] for name in sorted(root, key=lambda name: (name in made_of, name))}
    return _merged(ordered, cast)


def stand_in_of_index(index: FileIndex, *, mistral: bool) -> StandIn | None:
    """The stand-in for a bundle without any, from the index of its .tensors file.

    `mistral`: the model's only configuration is params.json. None if the file holds vLLM's own
    parameters, from which the checkpoint's tensors are not known. Raises CorruptError as
    layout.loadable does.
    """
    if is_vllm_layout(index) or is_rank_layout(index):
        return None
    entries = {
        module_name(record): entry_of(record.dtype, record.shape, record.length)
        for record in loadable(index)
        if record.dtype in DTYPE_LABELS
    }
    named = mistral or any(name.endswith(_MISTRALS_EMBEDDING) for name in entries)
    name = CONSOLIDATED if named else SINGLE_NAME
    return StandIn(name, _bytes_of(_Header(entries, {"format": "pt"})))


def entry_of(dtype: str, shape: Iterable[int], length: int) -> HeaderEntry:
    """A tensor's entry in a safetensors header, from torch's `dtype` and `shape`; `length` in
    bytes."""
    label, dimensions = DTYPE_LABELS[dtype], list(shape)
    if label == _PACKED_FP4:
        dimensions[-1] *= 2
    return HeaderEntry(label, dimensions, length)


def header_of(entries: dict[str, HeaderEntry]) -> bytes:
    """The header of a safetensors file in which the data follow in the order of `entries`."""
    return _bytes_of(_Header(entries, None))


def check_stand_in(path: Path) -> None:
    """Raises CorruptError unless the file at `path` is a safetensors header without data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length != size - 8:
            raise CorruptError(
                f"{path.name} in the bundle is not a safetensors header alone ({size} bytes).",
                hint="A bundle's weights are in its .tensors files. Pack the model again.",
            )


def shapes_in(directory: Path) -> dict[str, HeaderEntry]:
    """{tensor: its header entry} of the safetensors files at the root of `directory`, stand-ins
    or not. Files without a valid header are left out."""
    found: dict[str, HeaderEntry] = {}
    for path in sorted(directory.glob(f"*{STAND_IN_SUFFIX}")):
        header = _read_header(path) if path.is_file() else None
        found |= header.tensors if header is not None else {}
    return found


def _merged(headers: Mapping[str, _Header | None], cast: Cast | None) -> list[StandIn]:
    """One stand-in for each kind of file (Mistral's and others): vLLM merges all headers anyway."""
    kinds: dict[bool, dict[str, _Header]] = {False: {}, True: {}}
    for name, header in headers.items():
        if header is not None:
            kinds[fnmatch.fnmatch(name, MISTRALS)][name] = header
    made = []
    for mistrals, files in kinds.items():
        if not files:
            continue
        together = CONSOLIDATED if mistrals else SINGLE_NAME
        (name, *others) = files
        if others or name.startswith(".") or leaves_bundle(name):
            name = together
        tensors: dict[str, HeaderEntry] = {}
        metadata: dict[str, str] | None = None
        for header in files.values():
            metadata = header.metadata if metadata is None else metadata
            for tensor, entry in header.tensors.items():
                tensors[tensor] = _cast(entry, cast)
        made.append(StandIn(name, _bytes_of(_Header(tensors, metadata))))
    return made


def _cast(entry: HeaderEntry, cast: Cast | None) -> HeaderEntry:
    dtype = _DTYPES.get(entry.dtype)
    if cast is None or dtype is None or (wanted := cast(dtype)) == dtype:
        return entry
    length = entry.length // ITEM_SIZES[dtype] * ITEM_SIZES[wanted]
    return HeaderEntry(DTYPE_LABELS[wanted], entry.shape, length)


def _read_header(path: Path) -> _Header | None:
    """The header of a safetensors file; None for any other file."""
    source = LocalSource(path)
    try:
        if source.size < 8:
            return None
        length = int.from_bytes(source.read(0, 8), "little")
        if length > min(_MAX_HEADER, source.size - 8):
            return None
        header = read_json(source.read(8, length))
        if not isinstance(header, dict):
            return None
        metadata = header.pop("__metadata__", None)
        if isinstance(metadata, dict):
            # Other metadata may be private, and vLLM does not read it.
            metadata = {"format": str(metadata["format"])} if "format" in metadata else {}
        return _Header({name: _entry(entry) for name, entry in header.items()}, metadata)
    except (ValueError, TypeError, KeyError):
        return None
    finally:
        source.close()


def _entry(entry: dict[str, Any]) -> HeaderEntry:
    begin, end = entry["data_offsets"]
    return HeaderEntry(str(entry["dtype"]), entry["shape"], end - begin)


def _bytes_of(header: _Header) -> bytes:
    document: dict[str, object] = {}
    if header.metadata is not None:
        document["__metadata__"] = header.metadata
    at = 0
    for name, entry in header.tensors.items():
        document[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [at, at + entry.length],
        }
        at += entry.length
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
