"""What vLLM calls in each of its processes: here its load format `tensorizer` becomes our loader.

Cheap where tensorserve did not start the engine; `vllm_loader` holds what knows vLLM's internals.
"""

from __future__ import annotations

import os

from tensorserve.settings import HANDOFF_VARIABLE


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once."""
    if HANDOFF_VARIABLE not in os.environ:
        return  # a plain `vllm serve` beside an installed tensorserve stays as it is
    from vllm.model_executor.model_loader import register_model_loader

    from tensorserve.vllm_loader import TensorserveLoader

    register_model_loader("tensorizer")(TensorserveLoader)
