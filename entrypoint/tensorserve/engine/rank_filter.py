"""Which of a checkpoint's tensors would vLLM certainly drop on this rank?

These are layers of other pipeline stages, experts of other ranks, and tensors that the model class
declares unused. vLLM (0.32.0) reads and drops them (`PPMissingLayer` in models/utils.py,
`weight_loader` of fused_moe/routed_experts.py; its own loader has the option
`enable_ep_weight_filter`, off by default). In doubt, a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn

# As in vLLM's model_loader/ep_weight_filter.py: weights of one expert, but not scales, since some
# kernels need the scales of all experts.
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\..*\.(weight|weight_packed)$")
_INNER = ".routed_experts"


def dropped_here(model: nn.Module, *, balanced: bool) -> Callable[[str], bool]:
    """A function: whether vLLM drops the tensor of this name in the checkpoint on this rank.

    `balanced`: experts move between ranks while serving (EPLB), so that any expert may be needed.
    """
    stages = tuple(_missing_layers(model))
    experts = {} if balanced else dict(_experts_elsewhere(model))
    # Some models name their layers differently from the checkpoint.
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
        # The expert's number must be the same in both names; the mapper may change the layer only.
        own, here = _EXPERT.match(name), _EXPERT.match(mapped)
        if own is None or here is None or own[2] != here[2]:
            return False
        return int(here[2]) in experts.get(here[1], ())

    return dropped


def _missing_layers(model: nn.Module) -> Iterator[str]:
    """Prefixes of the numbered layers of other pipeline stages.

    Modules beside them are not included: an embedding may be needed for an lm_head tied to it.
    """
    # Imported here: the plugin imports the loader while vLLM is importing its models.
    from vllm.model_executor.models.utils import PPMissingLayer

    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PPMissingLayer) and name.rpartition(".")[2].isdecimal():
            yield name + "."


def _experts_elsewhere(model: nn.Module) -> Iterator[tuple[str, frozenset[int]]]:
    """(name of a layer's experts, numbers of the experts on other ranks)."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for name, module in model.named_modules():
        if not isinstance(module, RoutedExperts) or module.expert_map_manager.expert_map is None:
            continue
        places = module.expert_map_manager.expert_map.tolist()
        elsewhere = frozenset(number for number, place in enumerate(places) if place == -1)
        yield name.removesuffix(_INNER), elsewhere
