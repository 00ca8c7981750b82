"""Which nested weight files does vLLM read below a model's directory, and can they be packed?"""

from __future__ import annotations

from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.bundle.nested_weights import MODULES, NESTED_FILE, PICKLED_CLASS, dense_folders
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.safetensors import StoredTensor, read_safetensors

_PICKLE = "pytorch_model.bin"
# The files that vLLM's model classes open: jina.py, kimi_audio.py, mimo_audio.py, clef_omni.py in
# vllm/model_executor/models (0.32.0).
_PATTERNS = (
    "adapters/*/adapter_model.safetensors",
    "whisper-large-v3/*.safetensors",
    "audio_tokenizer/model.safetensors",
    "joint_head.safetensors",
)
# Folders in which vLLM opens a pickle if there is no safetensors file.
_PICKLE_FOLDERS = ("audio_tokenizer",)
_PICKLES_OF_CLASS = ("sparse_linear.pt", "colbert_linear.pt")
_MAX_MODULES_BYTES = 1024**2


def read_nested(directory: Path) -> dict[str, tuple[StoredTensor, ...]]:
    """{relative name: its tensors} of the nested weight files below the model's `directory`.

    Raises ConfigurationError if vLLM would read a pickle, CorruptError if a file is missing or
    damaged.
    """
    names = {
        path.relative_to(directory).as_posix()
        for pattern in _PATTERNS
        for path in directory.glob(pattern)
        if path.is_file()
    }
    for folder in _PICKLE_FOLDERS:
        _refuse_pickle(directory, folder)
    for folder in _dense_of_directory(directory):
        _refuse_pickle(directory, folder)
        names.add(f"{folder}/{NESTED_FILE}")
    _refuse_pickled_class(directory)
    return {name: tuple(read_safetensors(directory / name)) for name in sorted(names)}


def _dense_of_directory(directory: Path) -> list[str]:
    path = directory / MODULES
    if not path.is_file() or path.stat().st_size > _MAX_MODULES_BYTES:
        return []
    return list(dense_folders(path.read_bytes(), str(path)))


def _refuse_pickle(directory: Path, folder: str) -> None:
    weights, pickle = directory / folder / NESTED_FILE, directory / folder / _PICKLE
    if weights.is_file():
        return
    if pickle.is_file():
        raise ConfigurationError(
            f"{pickle} is a pickle, and vLLM needs the weights in it: opening a pickle runs the "
            "code in it, so that is never done here.",
            hint="Convert it if you trust it, with torch and safetensors: "
            f"save_file(torch.load('{_PICKLE}', weights_only=True), '{NESTED_FILE}').",
        )
    if folder not in _PICKLE_FOLDERS:
        raise CorruptError(
            f"{directory / MODULES} names a Dense layer in {folder}, which has no {NESTED_FILE}.",
            hint="Download the model again; an interrupted download leaves files out.",
        )


def _refuse_pickled_class(directory: Path) -> None:
    try:
        config = read_json((directory / "config.json").read_bytes())
        named = config.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return  # check_model_config reports an invalid config.json
    if PICKLED_CLASS in named:
        raise ConfigurationError(
            f"{directory} is served by vLLM's {PICKLED_CLASS}, which reads "
            f"{' and '.join(_PICKLES_OF_CLASS)}: pickles, which a bundle never includes.",
            hint='Dense embeddings need neither: set "architectures" to ["XLMRobertaModel"] in '
            "config.json.",
        )
