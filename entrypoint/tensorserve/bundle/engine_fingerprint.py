"""Does this start's engine match the engine that a bundle of layout `vllm` was packed from?

Names, shapes and meaning of vLLM's parameters depend on every field of the fingerprint. A
difference that no field covers (padding for one kind of GPU, for example) is a shape that does not
fit, and is found when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tensorserve.errors import ConfigurationError

# HF: tensor names and shapes of a Hugging Face checkpoint, the input of vLLM's load_weights().
# VLLM: each rank's parameters as vLLM holds them.
HF, VLLM = LAYOUTS = ("hf", "vllm")
# The parameters are taken after load_weights() and before process_weights_after_loading().
STAGE = "before post-processing"


MOST_RANKS = 4096
"""Upper bound of tensor-parallel × pipeline-parallel size. It bounds the list of shards."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The engine that a bundle of layout `vllm` was packed from."""

    vllm: str  # version without the local part after "+", which names the build
    device: str  # "cpu" or "cuda"
    architecture: str  # vLLM's model class
    dtype: str  # "bfloat16"
    quantization: str  # vLLM's name for the method, or "none"
    tensor_parallel_size: int
    pipeline_parallel_size: int
    expert_parallel: bool
    stage: str = STAGE

    def __str__(self) -> str:
        return (
            f"vLLM {self.vllm}, {self.architecture}, {self.dtype}, {self.device}, "
            f"{self.ranks} rank(s)"
        )

    @property
    def ranks(self) -> int:
        """The number of ranks, each with a shard."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as it is written in manifest.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> Fingerprint:
        """The reverse of to_json. Raises ValueError for a missing field, a wrong type or size."""
        if not isinstance(document, Mapping):
            raise ValueError("its fingerprint is not an object")
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = document.get(field.name)
            # Compared by name: annotations are strings here. isinstance() would accept a bool
            # as an int.
            if type(value).__name__ != field.type:
                raise ValueError(f"{field.name!r} of its fingerprint is not a {field.type}")
            values[field.name] = value
        made = cls(**values)
        sizes = (made.tensor_parallel_size, made.pipeline_parallel_size)
        if min(sizes) < 1:
            raise ValueError("its fingerprint has a parallel size below 1")
        if max(sizes) > MOST_RANKS or made.ranks > MOST_RANKS:
            raise ValueError(f"its fingerprint has more than {MOST_RANKS} ranks")
        return made


# Each field's name in messages, and the vLLM flag that sets it.
_WORDS = {
    "vllm": ("vLLM", None),
    "device": ("device", None),
    "architecture": ("model class", None),
    "dtype": ("dtype", "DTYPE"),
    "quantization": ("quantization", None),
    "tensor_parallel_size": ("tensor-parallel size", "TENSOR_PARALLEL_SIZE"),
    "pipeline_parallel_size": ("pipeline-parallel size", "PIPELINE_PARALLEL_SIZE"),
    "expert_parallel": ("expert parallelism", "ENABLE_EXPERT_PARALLEL"),
    "stage": ("parameters taken", None),
}


def check_fingerprint(packed: Fingerprint, here: Mapping[str, object]) -> None:
    """Raises ConfigurationError with every field in which `here` differs from `packed`.

    `here` has the fields of this start's engine that are known so far.
    """
    wanted, known = packed.to_json(), {"stage": STAGE} | dict(here)
    differing = [name for name, value in known.items() if value != wanted[name]]
    if not differing:
        return
    said = "; ".join(
        f"{_WORDS[name][0]}: the bundle has {_shown(wanted[name])}, "
        f"this start {_shown(known[name])}"
        for name in differing
    )
    flags = {_WORDS[name][1]: _shown(wanted[name]) for name in differing}
    as_packed = " and ".join(f"TENSORSERVE_VLLM_{flag}={value}" for flag, value in flags.items())
    raise ConfigurationError(
        f"The bundle holds vLLM's own parameters, of another engine than this start's. {said}.",
        hint=("Pack" if None in flags else f"Set {as_packed}, or pack")
        + " the model again for this engine; `tensorserve pack --layout hf` makes a bundle for any "
        "engine.",
    )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
