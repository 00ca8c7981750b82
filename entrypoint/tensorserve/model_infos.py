"""What vLLM wants to know of a model's class before a start: an image brings it.

Where its cache lacks it (in each new container), vLLM first imports itself in another process, only
to look at that class: a fifth of a start. docker/model-infos looks while the image is built. vLLM
takes what it finds only if it fits its own code, byte for byte.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorserve.bounded_json import read_json

BROUGHT = Path(sys.prefix) / "share/vllm"


def bring_model_infos(
    model_dir: Path, environment: Mapping[str, str], brought: Path = BROUGHT
) -> None:
    """Put what the image has for the model in `model_dir` (its config.json) into vLLM's cache.

    Where that cannot be done nothing is: vLLM then looks for itself. `environment`: vLLM's.
    """
    if "VLLM_CACHE_ROOT" not in environment or not brought.is_dir():
        return
    with suppress(OSError, ValueError):
        architectures = _architectures(read_json((model_dir / "config.json").read_bytes()))
        files = json.loads((brought / "architectures.json").read_bytes())
        cache = Path(environment["VLLM_CACHE_ROOT"]) / "modelinfos"
        for architecture in architectures:
            if architecture in files:
                _bring(brought / "modelinfos" / files[architecture], cache)


def _architectures(config: object) -> list[str]:
    """Whatever a config.json may hold: vLLM is who complains of it."""
    named = config.get("architectures") if isinstance(config, dict) else None
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _bring(info: Path, cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    held = cache / info.name
    # It may be of another version of vLLM, where the cache is a volume.
    if held.exists() and held.read_bytes() == info.read_bytes():
        return
    # Whole or not at all: other containers may have the same volume.
    partial = cache / f".{info.name}.{secrets.token_hex(4)}"
    try:
        shutil.copyfile(info, partial)
        partial.replace(held)
    finally:
        partial.unlink(missing_ok=True)
