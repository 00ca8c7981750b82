"""How do a bundle's LoRA adapters reach vLLM, without a plain-text file on a disk?

vLLM reads adapters from safetensors files: each is held in memory as one (launch/held_weights.py),
beside its configuration.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tensorserve.bundle.adapters import (
    CONFIG,
    SAFETENSORS,
    WEIGHTS,
    adapter_file,
    adapters_of,
    rank_of,
)
from tensorserve.bundle.manifest import Manifest
from tensorserve.config.settings import Settings
from tensorserve.errors import CorruptError
from tensorserve.launch.held_weights import check_room, holder_of

_THREADS = 4


@dataclass(frozen=True)
class Adapter:
    """An adapter that vLLM can load: its name, its directory, its largest rank."""

    name: str
    directory: Path
    rank: int


def hold_adapters(
    bundle_uri: str, model_dir: Path, settings: Settings, manifest: Manifest | None
) -> tuple[Adapter, ...]:
    """Put the adapters of the bundle into this process's memory, where they stay as long as it.

    Their configurations are in `model_dir` already. Raises CorruptError, ConfigurationError (too
    large for TENSORSERVE_HOST_MEMORY_LIMIT) and the sources' errors.
    """
    names = adapters_of(manifest)
    if manifest is None or not names:
        return ()
    check_room(
        [manifest.tensors_files[adapter_file(name, WEIGHTS)] for name in names],
        settings,
        "adapters",
        "Raise it (they stay in memory), or set TENSORSERVE_VLLM_ENABLE_LORA=false to serve the "
        "model without them.",
    )
    holder = holder_of(bundle_uri, settings, manifest)

    def hold(name: str) -> Adapter:
        config = model_dir / adapter_file(name, CONFIG)
        if not config.is_file():
            raise CorruptError(f"Adapter {name!r} of the bundle has no {CONFIG}.")
        rank = rank_of(config.read_bytes(), str(config))
        holder.hold(adapter_file(name, WEIGHTS), config.with_name(SAFETENSORS))
        return Adapter(name, config.parent, rank)

    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(hold, names))
