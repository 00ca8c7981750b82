"""What is this engine's fingerprint, from vLLM's configuration (0.32.0)?"""

from __future__ import annotations

from importlib import metadata

from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from tensorserve.bundle.engine_fingerprint import Fingerprint


def engine_fingerprint(vllm_config: VllmConfig, model_config: ModelConfig) -> Fingerprint:
    """The fingerprint of the engine that vLLM builds from these configurations."""
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
