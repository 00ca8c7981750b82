"""What is a LoRA adapter, in a directory of PEFT's and in a bundle? See docs/bundle-format.md.

In a bundle: ``adapters/NAME/adapter_model.tensors`` and ``adapters/NAME/adapter_config.json``.
"""

from __future__ import annotations

import re
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.checkpoint import Checkpoint, read_safetensors
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.manifest import Manifest

ADAPTERS = "adapters"
WEIGHTS, CONFIG = "adapter_model.tensors", "adapter_config.json"
SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# Clients send it as the model's name; it is a directory's name and part of a flag as well.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_CONFIG = 1024**2
# vLLM serves up to 512; what is above that is said where it is served.
_MOST_RANK = 65536


def adapter_file(name: str, file: str) -> str:
    """The path in a bundle of an adapter's file."""
    return f"{ADAPTERS}/{name}/{file}"


def adapters_of(manifest: Manifest | None) -> tuple[str, ...]:
    """The names of the adapters in a bundle, sorted. Raises CorruptError for one that is none."""
    names = []
    for path in manifest.tensors_files if manifest else ():
        folder, _, file = path.rpartition("/")
        if file == WEIGHTS and folder.startswith(f"{ADAPTERS}/"):
            name = folder.removeprefix(f"{ADAPTERS}/")
            if not _NAME.fullmatch(name):
                raise CorruptError(f"The manifest names an adapter {name!r}, which is no name.")
            names.append(name)
    return tuple(sorted(names))


def read_adapters(given: list[str]) -> dict[str, Checkpoint]:
    """`NAME=PATH` of the command line → what there is to pack. Raises ConfigurationError."""
    found: dict[str, Checkpoint] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigurationError(
                f"--lora {text!r} is not NAME=PATH.", hint="For example --lora sql=./sql-adapter."
            )
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"--lora {text!r}: the name may have letters, digits, '.', '_' and '-', and begins "
                "with a letter or a digit.",
                hint="Clients ask for the adapter by this name.",
            )
        if name in found:
            raise ConfigurationError(f"--lora names {name!r} twice.")
        found[name] = _read(name, Path(path))
    return found


def rank_of(config: bytes, where: str) -> int:
    """The largest rank in an adapter_config.json. Raises ConfigurationError where there is none."""
    try:
        document = read_json(config)
        pattern = document.get("rank_pattern") or {}
        ranks: list[int] = [document["r"], *pattern.values()]
        if not all(type(rank) is int and 0 < rank <= _MOST_RANK for rank in ranks):
            raise ValueError(f"its ranks are not whole numbers from 1 to {_MOST_RANK}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{where} is no configuration of a LoRA adapter: {error!r}.",
            hint="It is what PEFT's save_pretrained() writes, with the rank as 'r'.",
        ) from error
    return max(ranks)


def _read(name: str, directory: Path) -> Checkpoint:
    if not directory.is_dir():
        raise ConfigurationError(
            f"--lora {name}: {directory} is not a directory.",
            hint="Give the directory that PEFT's save_pretrained() wrote.",
        )
    config, weights = directory / CONFIG, directory / SAFETENSORS
    if not config.is_file():
        raise ConfigurationError(f"--lora {name}: {config} does not exist.")
    if config.stat().st_size > _MAX_CONFIG:
        raise ConfigurationError(f"--lora {name}: {config} is too large.")
    content = config.read_bytes()
    rank_of(content, str(config))
    kind = read_json(content).get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigurationError(
            f"--lora {name}: {config} is of peft_type {kind!r}; vLLM serves LoRA adapters only."
        )
    if not weights.is_file():
        if (directory / PICKLE).exists():
            raise ConfigurationError(
                f"--lora {name}: {directory / PICKLE} is a pickle; opening it runs whatever code "
                "is in it, so that is never done here.",
                hint="Save the adapter again: save_pretrained(DIR, safe_serialization=True).",
            )
        raise ConfigurationError(f"--lora {name}: {weights} does not exist.")
    tensors = tuple(read_safetensors(weights))
    if not tensors:
        raise ConfigurationError(f"--lora {name}: {weights} holds no tensors.")
    left = sorted(
        path.name for path in directory.iterdir() if path.name not in {CONFIG, SAFETENSORS}
    )
    return Checkpoint(directory, tensors, {CONFIG: len(content)}, tuple(left))
