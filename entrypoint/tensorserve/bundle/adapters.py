"""Which LoRA adapters does a bundle contain, and what is each adapter's rank?

Each adapter is ``adapters/NAME/adapter_model.tensors`` and ``adapters/NAME/adapter_config.json``
(docs/bundle-format.md).
"""

from __future__ import annotations

from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.bundle.adapter_identity import ADAPTER_NAME
from tensorserve.bundle.manifest import Manifest
from tensorserve.errors import ConfigurationError, CorruptError

ADAPTERS = "adapters"
WEIGHTS, CONFIG = "adapter_model.tensors", "adapter_config.json"
# The weights file that vLLM opens in an adapter's directory.
SAFETENSORS = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1024**2
_UNSERVED = (
    *("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora"),
)
# Values of init_lora_weights that leave the model's own weights unchanged.
_SERVED_INITIALIZATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
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


def unserved(config: dict[str, Any]) -> str | None:
    """The first setting of an adapter_config.json that vLLM 0.32.0 refuses; None if it serves all.

    vLLM refuses it only when it loads the adapter. Follows lora/peft_helper.py,
    `_validate_features` and `validate_legal`.
    """
    kept = config.get("modules_to_save")
    if isinstance(kept, list) and set(map(str, kept)) - {"classifier", "score"}:
        return f"modules_to_save {kept}"
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower() not in _SERVED_INITIALIZATIONS:
        return f"init_lora_weights {initial!r}"
    if (bias := config.get("bias", "none")) != "none":
        return f"bias {bias!r}"
    return next((f"{flag} {config[flag]!r}" for flag in _UNSERVED if config.get(flag)), None)
