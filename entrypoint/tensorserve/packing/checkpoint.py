"""Which tensors and which small files does a Hugging Face directory contain?

The safetensors format: https://github.com/huggingface/safetensors#format. Only headers are read
here; CheckpointReader reads the tensors' bytes piece by piece. Pickles are never opened.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from tensorserve.bundle.model_config import check_model_config
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.safetensors import StoredTensor, read_safetensors
from tensorserve.packing.directory_entries import describe_broken_link
from tensorserve.packing.small_files import find_small_files
from tensorserve.packing.weight_files import INDEX_NAME, find_weights
from tensorserve.sources.local import LocalSource

_COMPARED_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, before it is packed."""

    directory: Path
    tensors: tuple[StoredTensor, ...]  # in the order of the files, so that reading is sequential
    files: dict[str, int]  # the small files to include: relative name → size in bytes
    left_out: dict[str, str]  # the files that are not included: relative name → reason
    weight_files: tuple[str, ...]  # the safetensors files of the model, relative names, sorted
    missing_tensors: tuple[str, ...] = ()  # tensors that the index names and no file has


def read_checkpoint(source: Path, *, code: bool = False) -> Checkpoint:
    """The checkpoint at `source`: a directory, or one .safetensors file in a model's directory.

    `code` includes its Python files. Raises ConfigurationError if there is no model, or only
    pickles; CorruptError if a file is damaged or missing; PermissionDeniedError if a file cannot be
    read.
    """
    if not source.exists():
        raise ConfigurationError(
            f"{source} is {describe_broken_link(source)}."
            if source.is_symlink()
            else f"{source} does not exist.",
            hint="Check the path, and that the volume is mounted.",
        )
    directory = source if source.is_dir() else source.parent
    weights = find_weights(source)
    tensors: dict[str, StoredTensor] = {}
    for path in weights.paths:
        for tensor in read_safetensors(path):
            if tensor.name in tensors:
                _refuse_different(tensors[tensor.name], tensor)
            tensors[tensor.name] = tensor
    if not tensors:
        raise ConfigurationError(
            f"The safetensors files in {directory} hold no tensors.",
            hint="Download the model again, or give another directory.",
        )
    read = {path.name for path in weights.paths}
    small = find_small_files(directory, read, code=code)
    check_model_config(directory, small.files)
    return Checkpoint(
        directory,
        tuple(tensors.values()),
        small.files,
        small.left_out,
        weight_files=tuple(sorted(read)),
        # vLLM reads the tensors in the files and ignores others in the index.
        missing_tensors=tuple(sorted(set(weights.weight_map) - set(tensors))),
    )


def _refuse_different(first: StoredTensor, second: StoredTensor) -> None:
    """Raises CorruptError unless two tensors of one name are equal.

    vLLM loads both; which one remains depends on the model class.
    """
    if (first.dtype, first.shape) == (second.dtype, second.shape) and _same_bytes(first, second):
        return
    raise CorruptError(
        f"Tensor {first.name!r} is in {first.path.name} and in {second.path.name}, and they "
        "differ.",
        hint=f"vLLM would overwrite one with the other. Remove one of the files, or write an "
        f"{INDEX_NAME} that names only the model's files.",
    )


def _same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    one, other = LocalSource(first.path), LocalSource(second.path)
    try:
        for start in range(0, first.length, _COMPARED_BYTES):
            length = min(_COMPARED_BYTES, first.length - start)
            if one.read(first.offset + start, length) != other.read(second.offset + start, length):
                return False
        return True
    finally:
        one.close()
        other.close()


class CheckpointReader:
    """Reads bytes of a checkpoint's tensors. Thread-safe."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
        self._sources: dict[Path, LocalSource] = {}
        self._opening = threading.Lock()

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `start` of tensor `name`.

        Raises CorruptError if the file changed since it was opened, and the sources' errors.
        """
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
