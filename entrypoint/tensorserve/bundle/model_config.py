"""Does a model have a configuration that vLLM can read: config.json, or Mistral's params.json?"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError, CorruptError

CONFIG, MISTRALS_CONFIG = "config.json", "params.json"
MAX_CONFIG_BYTES = 16 * 1024**2
"""Limit for the JSON files read here. The largest known ones have some hundred kilobytes."""


def check_model_config(directory: Path, files: Collection[str]) -> None:
    """Checks that `files`, names relative to `directory`, include a readable configuration.

    Raises ConfigurationError if there is none, CorruptError for one that is not a JSON object.
    """
    found = [name for name in (CONFIG, MISTRALS_CONFIG) if name in files]
    if not found:
        raise ConfigurationError(
            f"{directory} has no {CONFIG}.",
            hint="vLLM needs the model's configuration and tokenizer: pack the whole directory "
            "that save_pretrained() writes or `hf download` fetches.",
        )
    for name in found:
        json_object(name, lambda name: (directory / name).read_bytes(), str(directory / name))


def json_object(name: str, read: Callable[[str], bytes], where: str | None = None) -> Any:
    """The JSON object in file `name`.

    It is decoded as transformers does: UTF-8 without a byte order mark. `read` gives a file's
    content; `where` names the file in errors (default: `name`). Raises CorruptError if the file is
    not JSON, or not an object.
    """
    document = json_document(name, read, where)
    if not isinstance(document, dict):
        raise CorruptError(
            f"{where or name} is not a JSON object, but a {type(document).__name__}.",
            hint="Download the model again; vLLM could not read it either.",
        )
    return document


def json_document(name: str, read: Callable[[str], bytes], where: str | None = None) -> Any:
    """The value in the JSON file `name`. Raises CorruptError if it is not JSON, or too large."""
    data = read(name)
    try:
        if not data.strip():
            raise ValueError("it is empty")
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {len(data)} bytes, more than {MAX_CONFIG_BYTES}")
        return read_json(data.decode())
    except ValueError as error:
        raise CorruptError(
            f"{where or name} cannot be read as JSON: {error}.",
            hint="Download the model again; vLLM could not read it either.",
        ) from error
