"""For how many keys of its own has vLLM compiled models? More after a start: it compiled anew.

vLLM 0.32.0 makes a folder for each key: torch_compile_cache/<key> (vllm/compilation/backends.py:
1074) or, ahead of time, torch_compile_cache/torch_aot_compile/<key> (decorators.py:565).
"""

from __future__ import annotations

from pathlib import Path

_MODELS = "torch_compile_cache"
_AHEAD = "torch_aot_compile"


def compiled_keys(folder: Path) -> frozenset[str]:
    """The keys below `folder`, vLLM's VLLM_CACHE_ROOT; none where it cannot be read."""
    return frozenset(_names(folder / _MODELS) | _names(folder / _MODELS / _AHEAD)) - {_AHEAD}


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()
