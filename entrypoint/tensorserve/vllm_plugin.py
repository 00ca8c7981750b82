"""What does vLLM call in each of its processes? The registration of this package's model loaders.

Load format `tensorizer` becomes TensorserveLoader, and `tensorserve-pack` the loader of
`pack --layout vllm`.
Where adapters are found while serving, vLLM's API server asks our resolver. vLLM's variable
`VLLM_PLUGINS` (an allow-list) can exclude this plugin. The code that depends on vLLM's internals is
in engine/.
"""

from __future__ import annotations

import os

from tensorserve.engine import cpu_lora
from tensorserve.engine.gc_threshold import collect_as_usual
from tensorserve.engine.import_hook import when_imported


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once.

    Only vLLM's workers import model loaders. In its other processes the import would take up to
    half a second of each start, so it is done when vLLM imports its own loaders.
    """
    collect_as_usual()  # most of vLLM is imported by now
    when_imported("vllm.model_executor.model_loader", _register_loaders)
    when_imported("vllm.compilation.decorators", _adapt_compilation)
    when_imported(cpu_lora.MODULE, cpu_lora.leave_out_base_tokens)
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):  # config/adapter_flags.py
        # The API server's alone.
        when_imported("vllm.entrypoints.openai.models.serving", _register_resolver)


def _register_resolver() -> None:
    from tensorserve.engine.adapters.resolver import register_resolver

    register_resolver()


def _adapt_compilation() -> None:
    from tensorserve.engine.aot_loading import load_compiled_models
    from tensorserve.engine.compile_key import adapt_key

    if adapt_key():
        load_compiled_models()


def _register_loaders() -> None:
    from tensorserve.engine.loader import TensorserveLoader
    from tensorserve.engine.registration import register_loaders
    from tensorserve.packing.rank_parameters import LOAD_FORMAT
    from tensorserve.packing.vllm_worker import PackLoader

    register_loaders({"tensorizer": TensorserveLoader, LOAD_FORMAT: PackLoader})
