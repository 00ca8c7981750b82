"""Which LoRA adapters does a bundle contain, and what is each adapter's rank?

Each adapter is ``adapters/NAME/adapter_model.tensors`` and ``adapters/NAME/adapter_config.json``
(docs/bundle-format.md).
"""

from __future__ import annotations

import re

from tensorserve.bounded_json import read_json
from tensorserve.bundle.manifest import Manifest
from tensorserve.errors import ConfigurationError, CorruptError

ADAPTERS = "adapters"
WEIGHTS, CONFIG = "adapter_model.tensors", "adapter_config.json"
# The weights file that vLLM opens in an adapter's directory.
SAFETENSORS = "adapter_model.safetensors"
# The name is a model name in requests, a directory name, and part of a vLLM flag.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MOST_CONFIG_BYTES = 1024**2
# An upper bound for a plausible rank. vLLM accepts up to 512; the start checks that limit.
_MAX_RANK = 65536


def adapter_file(name: str, file: str) -> str:
    """The path of `file` of adapter `name`, relative to the bundle."""
    return f"{ADAPTERS}/{name}/{file}"


def adapters_of(manifest: Manifest | None) -> tuple[str, ...]:
    """The names of the adapters in a bundle, sorted. Raises CorruptError for an invalid name."""
    names = []
    for path in manifest.tensors_files if manifest else ():
        folder, _, file = path.rpartition("/")
        if file == WEIGHTS and folder.startswith(f"{ADAPTERS}/"):
            name = folder.removeprefix(f"{ADAPTERS}/")
            if not ADAPTER_NAME.fullmatch(name):
                raise CorruptError(f"The manifest has an adapter with an invalid name: {name!r}.")
            names.append(name)
    return tuple(sorted(names))


def rank_of(config: bytes, where: str) -> int:
    """The largest LoRA rank in `config`, the content of an adapter_config.json.

    `where` names the file in errors. Raises ConfigurationError if there is no valid rank.
    """
    try:
        document = read_json(config)
        pattern = document.get("rank_pattern") or {}
        ranks: list[int] = [document["r"], *pattern.values()]
        if not all(type(rank) is int and 0 < rank <= _MAX_RANK for rank in ranks):
            raise ValueError(f"its ranks are not whole numbers from 1 to {_MAX_RANK}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{where} is not a valid LoRA configuration: {error!r}.",
            hint="Use the adapter_config.json that PEFT's save_pretrained() writes; its 'r' is "
            "the rank.",
        ) from error
    return max(ranks)
