"""Which engine is it that holds the parameters?

With the other `vllm_*` modules the only one that knows vLLM's internals (0.32.0).
"""

from __future__ import annotations

from importlib import metadata

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from tensorserve.fingerprint import Fingerprint


def engine_fingerprint(vllm_config: VllmConfig, model_config: ModelConfig) -> Fingerprint:
    """All that decides how this engine's ranks hold their parameters."""
    parallel = vllm_config.parallel_config
    return Fingerprint(
        vllm=metadata.version("vllm").partition("+")[0],
        device=current_platform.device_type,
        architecture=model_config.architecture,
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization or "none"),
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        expert_parallel=parallel.enable_expert_parallel,
    )
