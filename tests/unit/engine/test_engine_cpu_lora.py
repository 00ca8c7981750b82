"""Tokens without an adapter, in a batch in which others have one, on vLLM's CPU build."""

from __future__ import annotations

import torch


def test_a_token_without_an_adapter_gets_none() -> None:
    """vLLM's own functions, with all slots taken; the other tokens get what they got before."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    from tensorserve.engine.cpu_lora import leave_out_base_tokens

    original = getattr(lora_ops.bgmv_shrink, "tensorserve_original", lora_ops.bgmv_shrink)
    leave_out_base_tokens()
    leave_out_base_tokens()
    assert lora_ops.bgmv_shrink.tensorserve_original is original
    assert torch_ops.bgmv_shrink is lora_ops.bgmv_shrink
    inputs, weights = torch.ones(3, 4), torch.ones(2, 1, 5, 4)
    slots = torch.tensor([0, -1, 1])
    before, after = torch.full((3, 5), 9.0), torch.full((3, 5), 9.0)
    original(inputs, weights, before, slots, 2.0)
    assert before[1].tolist() == [8.0] * 5, "vLLM looks at -1 itself: engine/cpu_lora.py can go"
    lora_ops.sgmv_shrink(inputs, weights, after, None, torch.tensor([1, 1, 1]), slots, 3, 1, 3, 2.0)
    assert after.tolist() == [[8.0] * 5, [0.0] * 5, [8.0] * 5]
