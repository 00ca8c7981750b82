"""How does vLLM skip inspecting the model's class? The image brings the result for its cache.

In a new container vLLM's cache of model infos is empty, and vLLM imports itself in a subprocess to
inspect the class: a fifth of a start. docker/model-infos does so while the image is built. vLLM
uses an entry only where the hash of the model's source file matches. Can be removed when vLLM ships
these infos, or inspects a class without a subprocess.
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

    On failure nothing is done, and vLLM inspects the class itself. `environment`: vLLM's.
    """
    if "VLLM_CACHE_ROOT" not in environment or not brought.is_dir():
        return
    with suppress(OSError, ValueError):
        architectures = architectures_in(model_dir)
        files = json.loads((brought / "architectures.json").read_bytes())
        cache = Path(environment["VLLM_CACHE_ROOT"]) / "modelinfos"
        for architecture in architectures:
            if architecture in files:
                _bring(brought / "modelinfos" / files[architecture], cache)


def architectures_in(model_dir: Path) -> list[str]:
    """The names in `model_dir`/config.json; none where they are malformed, which vLLM reports.

    Raises OSError and ValueError if it is no JSON file.
    """
    config = read_json((model_dir / "config.json").read_bytes())
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
