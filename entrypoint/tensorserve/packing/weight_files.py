"""Which safetensors files of a directory would vLLM's default loader read as the model's weights?

Follows vLLM 0.32.0: model_executor/model_loader/default_loader.py `_prepare_weights` and
weight_utils.py `filter_duplicate_safetensors_files`, with the default load format. It reads files
of the directory itself only. An index selects files; it does not select tensors in them.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.safetensors import DAMAGED_HINT
from tensorserve.packing.directory_entries import describe_broken_link, kind_of, names_in

INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MISTRALS_FILES = "consolidated*.safetensors"
MISTRALS_INDEX = "consolidated.safetensors.index.json"
_FILES = "*.safetensors"
_MAX_INDEX = 100_000_000
_OTHERS_SUFFIXES = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX"}


@dataclass(frozen=True)
class WeightFiles:
    """The files in the order in which vLLM reads them, and the index, if there is one."""

    paths: tuple[Path, ...]
    index: Path | None = None
    weight_map: dict[str, str] = field(default_factory=dict)
    """{tensor: file} of the index. vLLM does not check that the files have these tensors."""


def find_weights(source: Path) -> WeightFiles:
    """The weight files of `source`: a directory, or a single .safetensors file.

    Raises ConfigurationError if there are none that vLLM would read, or only pickles; CorruptError
    for an invalid index, missing files, and entries that are not regular files.
    """
    if not source.is_dir():
        if source.suffix != ".safetensors":
            _refuse(source, [source.name])
        return WeightFiles((source,))
    names = names_in(source)
    mistral = _has_mistrals_weights(source)
    pattern, index = (
        (MISTRALS_FILES, source / MISTRALS_INDEX) if mistral else (_FILES, source / INDEX_NAME)
    )
    # As glob does: without hidden files, and case-sensitive.
    found = [n for n in names if fnmatch.fnmatchcase(n, pattern) and not n.startswith(".")]
    if not found:
        if mistral:
            raise ConfigurationError(
                f"{source} has a {MISTRALS_FILES} in a folder below it, so that vLLM expects "
                "Mistral's own layout, but none in the directory itself.",
                hint="Move that file to the directory itself, or out of it.",
            )
        _refuse(source, names)
    if index.is_symlink() and not index.exists():
        raise CorruptError(f"{index} is {describe_broken_link(index)}.", hint=DAMAGED_HINT)
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _read_index(index)
        _refuse_missing(source, index, set(weight_map.values()), set(found))
        found = [name for name in found if name in set(weight_map.values())]
        if not found:
            raise CorruptError(f"{index} names no weight file.", hint=DAMAGED_HINT)
    for name in found:
        if (kind := kind_of(source / name)) is not None:
            raise CorruptError(
                f"{source / name} is {kind}; vLLM would read it as weights.",
                hint="Replace it with the file, download the model again, or remove it if it is "
                "not part of the model.",
            )
    found.sort(key=_natural)
    return WeightFiles(
        tuple(source / name for name in found), index if weight_map else None, weight_map
    )


def _has_mistrals_weights(directory: Path) -> bool:
    """Whether vLLM expects Mistral's own layout (transformers_utils/repo_utils.py,
    `list_filtered_repo_files`).

    It searches all folders below the directory, hidden ones as well, and follows no links.
    """
    return any(
        fnmatch.fnmatchcase(name, MISTRALS_FILES) and Path(root, name).is_file()
        for root, _, names in os.walk(directory)
        for name in names
    )


def _natural(name: str) -> list[str | int]:
    """vLLM's sort key: digits in names compare as numbers (weight_utils.py `_natural_sort_key`)."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it has more than {_MAX_INDEX} bytes")
        index = read_json(path.read_bytes().decode())
        owner = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(owner, dict):
            raise ValueError("it has no weight_map")
        for tensor, name in owner.items():
            if not isinstance(name, str):
                raise ValueError(f"it says that tensor {tensor!r} is in {name!r}")
    except ValueError as error:
        raise CorruptError(f"{path} is not a weight index: {error}.", hint=DAMAGED_HINT) from error
    assert isinstance(owner, dict)
    return owner


def _refuse_missing(source: Path, index: Path, named: set[str], found: set[str]) -> None:
    missing = sorted(named - found)
    if not missing:
        return
    # "./a", "sub/a", "../a", "/models/a": vLLM compares the text with the names that it found.
    elsewhere = [name for name in missing if "/" in name]
    if elsewhere:
        raise CorruptError(
            f"{index} names {elsewhere[0]!r}. vLLM reads weight files of the directory itself "
            "only, and raises an error for any other path in the index.",
            hint="Put the files beside the index, and name them without a folder.",
        )
    raise CorruptError(
        f"{len(missing)} of {len(named)} weight files of {source} are missing: "
        f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}.",
        hint="Download the model again; an interrupted download leaves files out.",
    )


def _refuse(source: Path, names: Iterable[str]) -> None:
    names = list(names)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ConfigurationError(
            f"{source} has its weights as pickles only ({pickles[0]}): opening a pickle runs the "
            "code in it, so that is never done here.",
            hint="Get the safetensors version of the model, or convert it if you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW).",
        )
    found = f"{source} has no safetensors file"
    for name in names:
        kind = _OTHERS_SUFFIXES.get(Path(name).suffix.lower())
        if kind is not None:
            found += f", but weights of another format ({kind}: {name})"
            break
        if name.lower().endswith(".safetensors"):
            found += f"; vLLM ignores {name}: it ignores hidden files, and names are case-sensitive"
            break
    else:
        if source.is_dir() and (nested := next(source.glob("*/*.safetensors"), None)):
            found += (
                f" in itself; {nested.relative_to(source)} is in a folder, which vLLM does not read"
            )
    raise ConfigurationError(
        f"{found}.",
        hint="Give the directory of a Hugging Face model (config.json, *.safetensors, tokenizer).",
    )
