"""Does a LoRA adapter fit the model: its rank, the modules that it changes, their sizes?

vLLM 0.32.0 looks at the last part of a module's name only: it ignores an adapter's layers that the
model does not have, and finds other sizes when it copies them to the device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorserve.bundle.stand_ins import HeaderEntry, shapes_in

# What PEFT's save_pretrained() puts in front of each module's name.
_PEFT_PREFIX = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(A|B)\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_(A|B)")
# A full embedding that PEFT saved beside the adapter. vLLM ignores it (lora/utils.py,
# is_base_embedding_weights), which is right only where it is the model's own.
_FULL = re.compile(r"(.+?)(?:\.base_layer)?\.weight")
_EMBEDDINGS = ("embed_tokens", "lm_head")
# Of these a module's shape is that of its weight; others are packed.
_SHAPED = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class BaseModel:
    """What an adapter is compared with."""

    names: frozenset[str]
    """Under which the model is served."""
    most_rank: int
    """--max-lora-rank."""
    vocabulary: int | None = None
    """Tokens; None: not known."""
    tensors: Mapping[str, HeaderEntry] | None = None
    """Of the checkpoint; None or empty: not known, and modules are left to vLLM."""

    @classmethod
    def at(
        cls, directory: Path, names: frozenset[str], most_rank: int, vocabulary: int | None
    ) -> BaseModel:
        """The model whose headers are in `directory` (bundle/stand_ins.py)."""
        return cls(names, most_rank, vocabulary, shapes_in(directory))


@dataclass(frozen=True)
class Misfit:
    """Why an adapter cannot be served with the model."""

    reason: str
    """`rank` or `other_model`."""
    message: str


def misfit(
    shapes: Mapping[str, Sequence[int]],
    rank: int,
    base: BaseModel,
    base_model_name: str | None = None,
) -> Misfit | None:
    """The first reason why an adapter does not fit; None if none is known.

    `shapes`: {tensor: shape} of the adapter, under PEFT's names. `rank`: the largest one of its
    configuration. `base_model_name`: the model that its manifest names, if any.
    """
    if base_model_name is not None and base_model_name not in base.names:
        served = ", ".join(sorted(base.names))
        return Misfit(
            "other_model", f"its manifest says that it is for {base_model_name!r}, not {served!r}"
        )
    pairs = _pairs(shapes)
    rank = max([rank, *(pair["A"][0] for pair in pairs.values() if "A" in pair)])
    if rank > base.most_rank:
        return Misfit(
            "rank",
            f"it is of rank {rank}, --max-lora-rank is {base.most_rank} "
            "(TENSORSERVE_VLLM_MAX_LORA_RANK)",
        )
    said = _vocabulary(shapes, base) or _modules(pairs, base)
    return None if said is None else Misfit("other_model", said)


def _pairs(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Sequence[int]]]:
    """{module: {"A": shape, "B": shape}} of the matrices; embeddings are not among them."""
    pairs: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        if (found := _PAIR.fullmatch(name.removeprefix(_PEFT_PREFIX))) and len(shape) == 2:
            pairs.setdefault(found[1], {})[found[2]] = shape
    return pairs


def _vocabulary(shapes: Mapping[str, Sequence[int]], base: BaseModel) -> str | None:
    if base.vocabulary is None:
        return None
    for name, shape in shapes.items():
        bare = name.removeprefix(_PEFT_PREFIX)
        if len(shape) != 2 or "lora_A" in bare or "lora_B" in bare:
            continue
        if found := _EMBEDDING.fullmatch(bare):
            tokens = shape[1] if found[2] == "A" else base.vocabulary
        elif (full := _FULL.fullmatch(bare)) and full[1].endswith(_EMBEDDINGS):
            tokens = shape[0]
        else:
            continue
        if tokens != base.vocabulary:
            return f"{name} is for {tokens} tokens, the model has {base.vocabulary}"
    return None


def _modules(pairs: Mapping[str, Mapping[str, Sequence[int]]], base: BaseModel) -> str | None:
    tensors = base.tensors or {}
    known = {module for module in pairs if f"{module}.weight" in tensors}
    if not known:
        return None  # the checkpoint has other names, as Mistral's own format
    for module, pair in pairs.items():
        if module not in known:
            # Experts have other names in checkpoints, and a tied head has none.
            if "experts" in module or module.endswith(_EMBEDDINGS):
                continue
            return f"it changes {module}, which the model does not have"
        weight = tensors[f"{module}.weight"]
        if set(pair) != {"A", "B"}:
            return f"of {module} it has one matrix of two"
        rank, into = pair["A"]
        out, same = pair["B"]
        if rank != same:
            return f"the two matrices of {module} are of ranks {rank} and {same}"
        # GPT-2's weights are transposed.
        if weight.dtype in _SHAPED and sorted(weight.shape) != sorted((into, out)):
            return f"it changes {module} of {out}x{into}, the model's is {_times(weight.shape)}"
    return None


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
