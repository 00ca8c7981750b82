"""Does vLLM ask for the bundle's model, or for one with a directory of its own, and how is that
loaded?

vLLM (0.32.0) calls the loader once more for what speculates: a draft model, EAGLE's or Medusa's
heads, which have a directory, and for layers of the served model itself (MTP, DSpark), which have
its directory. Together with the other `vllm_*` modules the only one that knows vLLM's internals.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.config.utils import replace
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from tensorserve.drafts import local_bundle


def served_config(vllm_config: VllmConfig) -> ModelConfig:
    """The configuration of the model that is served, whichever one is asked for."""
    # A draft's VllmConfig has the draft's own as `model_config`.
    speculative = vllm_config.speculative_config
    target = None if speculative is None else speculative.target_model_config
    return target or vllm_config.model_config


def is_the_bundles(vllm_config: VllmConfig, model_config: ModelConfig, model_uri: str) -> bool:
    """Whether the weights of `model_config` are in the bundle at `model_uri`."""
    served = served_config(vllm_config)
    if model_config.model in {served.model, served.model_weights or served.model}:
        return True
    bundle = local_bundle(model_uri)
    return bundle is not None and os.path.abspath(model_config.model) == bundle  # noqa: PTH100


def is_a_draft(model_config: ModelConfig) -> bool:
    """Whether it is part of the served model, or takes from it, instead of being that model."""
    # What extracts hidden states has a copy of the served model's configuration.
    kind = getattr(model_config.hf_config, "model_type", None)
    return model_config.runner_type == "draft" or kind == "extract_hidden_states"


def load_other(
    load_config: LoadConfig, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
) -> nn.Module:
    """The model in the directory that `model_config` names, by vLLM's own loader and errors."""
    loader = DefaultModelLoader(_stock(load_config))
    model: nn.Module = loader.load_model(vllm_config, model_config, prefix)
    return model


def beside_the_checkpoint(
    load_config: LoadConfig, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what a model wants from other places than its checkpoint.

    As vLLM's own loader reads them, from where it would (`secondary_weights`: Ultravox' towers).
    """
    secondary = getattr(model, "secondary_weights", ())
    loader = DefaultModelLoader(_stock(load_config)) if secondary else None
    for source in secondary:
        assert loader is not None
        yield from loader._get_weights_iterator(source)


def _stock(load_config: LoadConfig) -> LoadConfig:
    # Our own options have no meaning there, and are refused.
    return replace(load_config, load_format="auto", model_loader_extra_config={})
