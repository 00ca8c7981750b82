"""Why does a request without an adapter stay without one, in a batch with others that have some?

vLLM 0.32.0 marks its tokens with the slot -1. Its kernels for GPUs leave them out; those of its CPU
build index with it, and take the last slot (lora/ops/torch_ops/lora_ops.py): where all slots are
taken, the model's own answers are an adapter's. The function that reads a slot first is changed in
memory: what it gives for -1 is zero, to which the second one adds nothing. Can go when the CPU
build's `bgmv_shrink` looks at -1 itself.
"""

from __future__ import annotations

import sys
from typing import Any

MODULE = "vllm.lora.ops.torch_ops.lora_ops"
_NAME = "bgmv_shrink"


def leave_out_base_tokens() -> None:
    """Called when MODULE was imported; may be called more than once."""
    original = getattr(sys.modules[MODULE], _NAME)
    if hasattr(original, "tensorserve_original"):
        return

    def bgmv_shrink(
        inputs: Any,
        lora_b_weights: Any,
        output_tensor: Any,
        lora_indices_tensor: Any,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(-1), 0)

    bgmv_shrink.tensorserve_original = original  # type: ignore[attr-defined]
    # Modules that were imported before have the function under its name as well.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.lora") and getattr(module, _NAME, None) is original:
            setattr(module, _NAME, bgmv_shrink)
