"""When may a start take compiled code from vLLM's cache? This changes two factors of vLLM's key.

An adaptation of `ModelConfig.compute_hash` (vllm/config/model.py:453, vLLM 0.32.0), which both of
vLLM's compile caches ask: compilation/caching.py (`aot_compile_hash_factors`) and
compilation/backends.py. It hashes every field of ModelConfig that it does not name.

- `model` is hashed, a path here. The state directory is another one at each start outside of the
  image, so no start found what an earlier one had compiled. What vLLM reads from the directory is
  in the key by itself: `hf_config`, with the quantization. (A relative path in a fixed working
  directory would need no change of the key, but users give relative paths in vLLM's flags, and
  `LLM(**llm_kwargs())` runs in a directory of the user's.) Can be removed when `model` is among
  the fields that vLLM ignores.
- The processor is not hashed. Inductor writes C++ for the vector width of the processor, and g++
  compiles it with -march=native. Another processor that shares the cache would compute something
  else, or end by SIGILL. Can be removed when vLLM or torch hash the processor for the CPU build
  (torch/_inductor/codecache.py, `CacheBase.get_system`, torch 2.13, hashes GPUs alone).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

from tensorserve.linux import processor_flags

# In the key in the place of a served directory.
_SERVED = "tensorserve:"
_served: set[str] = set()


def leave_out_of_key(directory: Path) -> None:
    """The name of the served `directory` shall not be in keys; paths in it are named by the rest.

    It counts once `adapt_key` was called.
    """
    _served.add(str(directory))


def adapt_key() -> bool:
    """Changes the two factors, in this process. False where vLLM's method is another one."""
    from vllm.config import ModelConfig

    stock: Any = getattr(ModelConfig, "compute_hash", None)
    if hasattr(stock, "__wrapped__"):
        return True
    if not _as_expected(stock):
        return False

    @functools.wraps(stock)
    def compute_hash(self: Any) -> str:
        named = _without_directory(self.model)
        if named != self.model:
            self = copy.copy(self)
            self.model = named
        return _with_processor(stock(self))

    ModelConfig.compute_hash = compute_hash
    return True


def _as_expected(stock: Any) -> bool:
    return inspect.isfunction(stock) and list(inspect.signature(stock).parameters) == ["self"]


def _without_directory(model: str) -> str:
    for directory in _served:
        if model == directory or model.startswith(f"{directory}/"):
            return _SERVED + model.removeprefix(directory)
    return model


def _with_processor(key: str) -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return key
    return hashlib.sha256(" ".join((key, *processor_flags())).encode()).hexdigest()
