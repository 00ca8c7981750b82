"""Which LoRA adapter does a PEFT directory contain, and can vLLM serve it?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.bundle.adapter_identity import ADAPTER_NAME
from tensorserve.bundle.adapters import (
    CONFIG,
    MOST_CONFIG_BYTES,
    SAFETENSORS,
    rank_of,
    unserved,
)
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.safetensors import read_safetensors
from tensorserve.packing.checkpoint import Checkpoint
from tensorserve.packing.directory_entries import is_lfs_pointer, kind_of, names_in

PICKLE = "adapter_model.bin"


def read_adapters(given: list[str]) -> dict[str, Checkpoint]:
    """{name: checkpoint} for the command line's `NAME=PATH` arguments.

    Raises ConfigurationError for an invalid argument, or an adapter that vLLM does not serve;
    CorruptError for a damaged file.
    """
    found: dict[str, Checkpoint] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigurationError(
                f"--lora {text!r} is not NAME=PATH.", hint="Example: --lora sql=./sql-adapter."
            )
        if not ADAPTER_NAME.fullmatch(name):
            raise ConfigurationError(
                f"--lora {text!r}: the name may have letters, digits, '.', '_' and '-', and must "
                "begin with a letter or a digit.",
                hint="Choose another name; clients send it as the model's name.",
            )
        if name in found:
            raise ConfigurationError(
                f"--lora names {name!r} twice.", hint="Give each adapter its own name."
            )
        found[name] = read_adapter(Path(path), f"--lora {name}")
    return found


def read_adapter(directory: Path, given: str) -> Checkpoint:
    """The adapter in `directory`, which PEFT has written; `given` names the argument in errors.

    Raises as read_adapters.
    """
    if not directory.is_dir():
        raise ConfigurationError(
            f"{given}: {directory} is not a directory.",
            hint="Give the directory that PEFT's save_pretrained() wrote.",
        )
    config, weights = directory / CONFIG, directory / SAFETENSORS
    if (problem := _problem(config)) is not None:
        raise ConfigurationError(f"{given}: {config} {problem}.")
    if config.stat().st_size > MOST_CONFIG_BYTES:
        raise ConfigurationError(f"{given}: {config} is too large.")
    if is_lfs_pointer(config):
        raise CorruptError(
            f"{config} is a Git LFS pointer, not the file itself.",
            hint="Download the files: `git lfs pull` in the adapter's directory.",
        )
    content = config.read_bytes()
    rank_of(content, str(config))
    document = read_json(content)
    kind = document.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigurationError(
            f"{given}: {config} is of peft_type {kind!r}; vLLM serves LoRA adapters only."
        )
    if (left := unserved(document)) is not None:
        raise ConfigurationError(
            f"{given}: {config} says {left}, which vLLM does not serve.",
            hint="Merge the adapter into the model (PEFT's merge_and_unload()), or train it "
            "without.",
        )
    if (problem := _problem(weights)) is not None:
        if not weights.is_symlink() and (directory / PICKLE).exists():
            raise ConfigurationError(
                f"{given}: {directory / PICKLE} is a pickle: opening it runs the code in it, "
                "so that is never done here.",
                hint="Save the adapter again: save_pretrained(DIR, safe_serialization=True).",
            )
        raise ConfigurationError(f"{given}: {weights} {problem}.")
    tensors = tuple(read_safetensors(weights))
    if not tensors:
        raise ConfigurationError(f"{given}: {weights} holds no tensors.")
    # An adapter's own tokenizer is left out: vLLM serves every adapter with the model's.
    others = [one for one in names_in(directory) if one not in {CONFIG, SAFETENSORS}]
    return Checkpoint(
        directory,
        tensors,
        {CONFIG: len(content)},
        dict.fromkeys(others, "vLLM does not read them"),
        weight_files=(SAFETENSORS,),
    )


def _problem(path: Path) -> str | None:
    """The problem with a required file, in words; None if it is a regular file."""
    if not os.path.lexists(path):
        return "does not exist"
    kind = kind_of(path)
    return None if kind is None else f"is {kind}"
