"""Which model does vLLM load: the bundle's, its draft, or another one from its own directory?

For speculative decoding, vLLM (0.32.0) calls the loader a second time: for a draft model or the
heads of EAGLE or Medusa, which have their own directory (possibly of the bundle's draft), or for
layers of the served model (MTP, DSpark), which have the served model's directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.config.utils import replace
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from tensorserve.config.draft_model import local_bundle
from tensorserve.launch.context import PackedDraft


def served_config(vllm_config: VllmConfig) -> ModelConfig:
    """The served (target) model's configuration, also if vLLM loads a draft."""
    # In a draft's VllmConfig, `model_config` is the draft's.
    speculative = vllm_config.speculative_config
    target = None if speculative is None else speculative.target_model_config
    return target or vllm_config.model_config


def ranks_config(vllm_config: VllmConfig, model_config: ModelConfig) -> ParallelConfig:
    """The served model's parallel configuration, also if vLLM loads a draft."""
    # A draft's own has neither data-parallel replicas nor pipeline stages.
    speculative = vllm_config.speculative_config
    served: ParallelConfig | None = None
    if speculative is not None and is_a_draft(model_config):
        served = speculative.target_parallel_config
    return served or vllm_config.parallel_config


def is_the_bundles(vllm_config: VllmConfig, model_config: ModelConfig, model_uri: str) -> bool:
    """Whether the weights of `model_config` are in the bundle at `model_uri`."""
    served = served_config(vllm_config)
    if model_config.model in {served.model, served.model_weights or served.model}:
        return True
    bundle = local_bundle(model_uri)
    return bundle is not None and os.path.abspath(model_config.model) == bundle  # noqa: PTH100


def is_packed(model_config: ModelConfig, draft: PackedDraft | None) -> bool:
    """Whether `model_config` has the directory of the bundle's own `draft`."""
    return draft is not None and os.path.abspath(model_config.model) == os.path.abspath(  # noqa: PTH100
        draft.directory
    )


def is_a_draft(model_config: ModelConfig) -> bool:
    """Whether the model is a draft, or a part or copy of the served model, for speculation."""
    # The extractor of hidden states has a copy of the served model's configuration.
    kind = getattr(model_config.hf_config, "model_type", None)
    return model_config.runner_type == "draft" or kind == "extract_hidden_states"


def asked_draft(vllm_config: VllmConfig) -> str | None:
    """The directory or name of the draft model, if there is one."""
    speculative = vllm_config.speculative_config
    model: str | None = None if speculative is None else speculative.model
    return model


def load_other(
    load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
) -> nn.Module:
    """Loads the model of `model_config` from its directory with vLLM's own loader and errors."""
    loader = DefaultModelLoader(_stock(load_config))
    model: nn.Module = loader.load_model(vllm_config, model_config, prefix)
    return model


def beside_the_checkpoint(
    load_config: LoadConfig, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs that a model loads from other places than its checkpoint.

    vLLM's own loader reads them (`secondary_weights` of a model class: Ultravox' towers).
    """
    secondary = getattr(model, "secondary_weights", ())
    loader = DefaultModelLoader(_stock(load_config)) if secondary else None
    for source in secondary:
        assert loader is not None
        yield from loader._get_weights_iterator(source)


def _stock(load_config: LoadConfig) -> LoadConfig:
    # vLLM's own loader refuses the options of load format `tensorizer`.
    return replace(load_config, load_format="auto", model_loader_extra_config={})
