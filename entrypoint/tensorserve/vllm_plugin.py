"""What vLLM calls in each of its processes: here its load format `tensorizer` becomes our loader,
and `tensorserve-pack` the one of `pack --layout vllm`.

`VLLM_PLUGINS`, vLLM's own list of the plugins that it may load, keeps it out where nobody wants it.
`vllm_loader` holds what knows vLLM's internals.
"""

from __future__ import annotations

from tensorserve.garbage import collect_as_usual
from tensorserve.importing import when_imported


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once.

    vLLM's loaders are imported by its workers alone. In its other processes the import would cost
    up to half a second of each start.
    """
    collect_as_usual()  # what is left to import is little
    when_imported("vllm.model_executor.model_loader", _register_loaders)


def _register_loaders() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from tensorserve.engine_parameters import LOAD_FORMAT
    from tensorserve.vllm_loader import TensorserveLoader
    from tensorserve.vllm_packing import PackLoader

    register_model_loader("tensorizer")(TensorserveLoader)
    register_model_loader(LOAD_FORMAT)(PackLoader)
