"""Which of a checkpoint's tensors would vLLM certainly drop on this rank?

Layers of other pipeline stages, experts of other ranks, and what a model itself says that it does
not use. vLLM (0.32.0) reads and drops them (`PPMissingLayer` in models/utils.py, `weight_loader`
of fused_moe/routed_experts.py; `enable_ep_weight_filter`, off by default, is the same in its own
loader). Where there is doubt, a tensor is read. Together with the other `vllm_*` modules the only
one that knows vLLM's internals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn

# As in model_loader/ep_weight_filter.py: a tensor for each expert, and no scales, of which some
# kernels want those of all experts.
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\..*\.(weight|weight_packed)$")
_INNER = ".routed_experts"


def dropped_here(model: nn.Module, *, balanced: bool) -> Callable[[str], bool]:
    """Says of a tensor, by its name in the checkpoint, that vLLM would drop it on this rank.

    `balanced`: experts move between ranks while serving (EPLB), so that any may be needed.
    """
    stages = tuple(_missing_layers(model))
    experts = {} if balanced else dict(_experts_elsewhere(model))
    # Some models' layers are called otherwise than the checkpoint's.
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    unused: Callable[[str], bool] | None = getattr(model, "is_unused_checkpoint_weight", None)

    def dropped(name: str) -> bool:
        if unused is not None and unused(name):
            return True
        if not stages and not experts:
            return False
        mapped: str | None = name if mapper is None else mapper.map_name(name)
        if mapped is None:
            return False
        if stages and mapped.startswith(stages):
            return True
        # The number is the checkpoint's: what a mapper makes of it counts for the layer alone.
        own, here = _EXPERT.match(name), _EXPERT.match(mapped)
        if own is None or here is None or own[2] != here[2]:
            return False
        return int(here[2]) in experts.get(here[1], ())

    return dropped


def _missing_layers(model: nn.Module) -> Iterator[str]:
    """Numbered layers of other pipeline stages.

    Not what stands beside them: an embedding may be wanted for a head that is tied to it.
    """
    # Late: the plugin imports the loader while vLLM is importing its models.
    from vllm.model_executor.models.utils import PPMissingLayer

    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PPMissingLayer) and name.rpartition(".")[2].isdecimal():
            yield name + "."


def _experts_elsewhere(model: nn.Module) -> Iterator[tuple[str, frozenset[int]]]:
    """(name of a layer's experts, numbers of those that are on other ranks)."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for name, module in model.named_modules():
        if not isinstance(module, RoutedExperts) or module.expert_map_manager.expert_map is None:
            continue
        places = module.expert_map_manager.expert_map.tolist()
        elsewhere = frozenset(number for number, place in enumerate(places) if place == -1)
        yield name.removesuffix(_INNER), elsewhere
