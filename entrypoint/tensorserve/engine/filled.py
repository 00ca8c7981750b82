"""Which parameters of a vLLM model did the checkpoint not fill, and which of them is an error?

vLLM's own check (0.32.0, DefaultModelLoader.track_weights_loading) compares the names that a model
reports as loaded. It skips quantized models and, in others, every layer with a quantization method,
which all linear layers, embeddings and experts have. A fused parameter counts as loaded after its
first part. Parameters that it misses keep uninitialised memory. This check compares the bytes that
were written, for all models alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from tensorserve.engine.memory_writes import Intervals, Memory, Watch, first_index, length, missing
from tensorserve.errors import CorruptError

# The most parameters that a message names.
_NAMED = 3


@dataclass(frozen=True)
class Unfilled:
    """A parameter that the checkpoint did not fill, or filled in part."""

    name: str
    index: list[int]
    """The index of the first unwritten value."""
    share: float
    """The filled fraction of the parameter, 0 to 1."""

    def __str__(self) -> str:
        if not self.share:
            return f"{self.name!r} (not filled)"
        return f"{self.name!r} ({self.share:.1%} filled, not at {self.index})"


@dataclass(frozen=True)
class Incomplete:
    """A parameter with unwritten bytes, and its module."""

    name: str
    module: nn.Module
    parameter: torch.Tensor
    memory: Memory
    left: Intervals
    """The bytes that the load did not write."""

    @property
    def leaf(self) -> str:
        """The last part of the parameter's name."""
        return self.name.rpartition(".")[2]

    @property
    def untouched(self) -> bool:
        """Whether the load wrote none of its bytes."""
        return length(self.left) == self.parameter.nbytes

    @property
    def valueless(self) -> bool:
        """Whether some of its bytes were not written when the model was created either."""
        born = self.memory.born
        return born is not None and bool(len(missing(self.parameter, born | self.memory.loaded)))

    @property
    def method(self) -> object:
        """The layer's quantization method; None if it has none."""
        return getattr(self.module, "quant_method", None)


def refuse_unfilled(
    watch: Watch, model: nn.Module, reported: set[str] | None, *, draft: bool = False
) -> None:
    """Raises CorruptError, naming them, if parameters of `model` were not filled.

    `watch` recorded the model's creation and load. `reported`: the names that the model's
    load_weights() returned. `draft`: the model is a draft, which shares the target model's
    embedding and lm_head.
    """
    found = list(unfilled(watch, model, reported or set(), draft=draft))
    if not found:
        return
    named = ", ".join(str(each) for each in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    count = sum(1 for _ in model.parameters())
    raise CorruptError(
        f"The file's tensors do not fill {len(found)} of the {count} parameters of vLLM's "
        f"{type(model).__name__}: {named}{more}.",
        hint="They would keep uninitialised memory. A safetensors file may have been missing when "
        "the model was packed: compare its directory with the original, and pack it again. A file "
        "that was not made from a checkpoint may have other tensor names.",
    )


def unfilled(
    watch: Watch, model: nn.Module, reported: set[str], *, draft: bool
) -> Iterator[Unfilled]:
    """The parameters that were not filled and must be. Arguments as in refuse_unfilled."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or isinstance(parameter, UninitializedParameter):
                continue
            seen.add(id(parameter))
            memory = watch.known(parameter)
            # None: the load itself created it, as online quantization does when a layer is
            # complete. An incomplete layer stays on the device "meta".
            if memory is None or parameter.numel() == 0:
                continue
            left = missing(parameter, memory.loaded)
            if not len(left):
                continue
            name = f"{path}.{leaf}" if path else leaf
            place = Incomplete(name, module, parameter, memory, left)
            if _is_allowed(place, name in reported, draft=draft):
                continue
            filled = 1 - length(left) / parameter.nbytes
            yield Unfilled(name, first_index(parameter, left), filled)


def _is_allowed(place: Incomplete, reported: bool, *, draft: bool) -> bool:
    if any(rule(place) for rule in _RULES) or (draft and _is_shared_with_the_target(place)):
        return True
    if place.valueless:
        return False
    # vLLM initialised it and the model reports it as loaded: it is computed (tables of positions),
    # or, without fusion and quantization, larger than the checkpoint's tensor.
    return reported and (place.untouched or place.method is None)


def _is_padding(place: Incomplete) -> bool:
    """vLLM allocates more than the checkpoint's tensor, and states how much is loaded."""
    expected = getattr(place.parameter, "weight_loader_numel", None)
    if expected is not None:
        filled = place.parameter.nbytes - length(place.left)
        return bool(filled >= expected * place.parameter.element_size())
    # Some kernels need padded matrices of experts: then part of each expert's matrix is written.
    sizes = getattr(place.module, "moe_config", None)
    padded = sizes is not None and (
        sizes.hidden_dim != sizes.hidden_dim_unpadded
        or sizes.intermediate_size_per_partition != sizes.intermediate_size_per_partition_unpadded
    )
    return padded and all(
        length(missing(expert, place.memory.loaded)) < expert.nbytes
        for expert in place.parameter.detach()
    )


def _is_a_scale_of_the_cache(place: Incomplete) -> bool:
    """The scales of keys, values and queries are 1 if the checkpoint has none."""
    return isinstance(place.method, BaseKVCacheMethod)


def _is_built_from_the_configuration(place: Incomplete) -> bool:
    """FBGEMM's upper bound (_CONFIG_BUILT_PARAMS of vLLM's default_loader.py)."""
    return place.leaf == "input_scale_ub"


def _is_read_by_no_kernel(place: Incomplete) -> bool:
    """compressed-tensors stores a shape beside packed weights, which vLLM loads and ignores."""
    return place.leaf in {"weight_shape", "w13_weight_shape", "w2_weight_shape"}


def _is_an_unused_bias(place: Incomplete) -> bool:
    """GPTQ's experts allocate biases; vLLM drops them if the checkpoint has none."""
    has_none = not getattr(getattr(place.module, "moe_config", None), "has_bias", True)
    return has_none and place.leaf in {"w13_bias", "w2_bias"} and place.untouched


def _is_an_unused_activation_scale(place: Incomplete) -> bool:
    """NVFP4's experts allocate one although only weights are quantized; vLLM does not use it."""
    method = place.method
    kept_whole = getattr(method, "use_a16", False) or getattr(method, "per_token_activation", False)
    return bool(kept_whole) and place.leaf.endswith(("input_scale", "input_global_scale"))


def _is_marked_as_absent(place: Incomplete) -> bool:
    """ModelOpt's scales are initialised to NaN, which vLLM handles after the load."""
    values = place.parameter.detach()
    if place.valueless or not place.untouched or not values.is_floating_point():
        return False
    return bool(values.float().isnan().all())


def _is_a_transform(place: Incomplete) -> bool:
    """Layers share it, and it is computed unless dense (SKIP_MODULES of vLLM's reload/meta.py)."""
    return type(place.module).__name__ == "HadamardTransform"


def _is_shared_with_the_target(place: Incomplete) -> bool:
    """A draft without its own embedding or lm_head shares those of the target model (vLLM's
    llm_base_proposer.py, _maybe_share_embeddings and _maybe_share_lm_head).
    """
    layer = place.name.split(".")[-2:-1]
    return place.untouched and layer in (["embed_tokens"], ["embedding"], ["lm_head"], ["head"])


_RULES: tuple[Callable[[Incomplete], bool], ...] = (
    _is_padding,
    _is_a_scale_of_the_cache,
    _is_built_from_the_configuration,
    _is_read_by_no_kernel,
    _is_an_unused_bias,
    _is_an_unused_activation_scale,
    _is_marked_as_absent,
    _is_a_transform,
)
