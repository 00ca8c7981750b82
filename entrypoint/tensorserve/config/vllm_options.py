"""What do the arguments of `vllm serve` say that a start itself has to know?

The only place that looks for arguments by name; the rest of a start reads the fields below.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorserve.bundle.engine_fingerprint import MOST_RANKS
from tensorserve.config.draft_model import Draft, draft_of
from tensorserve.config.ranks import Parallel
from tensorserve.config.vllm_arguments import Arguments
from tensorserve.errors import ConfigurationError

# Few enough for int(), which refuses more than 4,300 in its own words.
_MOST_DIGITS = 18
# supervisord waits longer than that (config/supervisord.conf).
MOST_DRAIN_SECONDS = 10**6
# vLLM's other names for dtypes (vllm/config/model.py, 0.32.0); "auto" is decided by vLLM.
_DTYPES = {"half": "float16", "float": "float32"}
# With these, less than the whole checkpoint stays on the GPUs.
_SMALLER_ON_GPU = frozenset(
    {"quantization", "cpu-offload-gb", "offload-group-size", "offload-backend"}
)
# With these, a deployment has other replicas beside this server's one.
_ONE_REPLICA = frozenset({"data-parallel-rank", "data-parallel-external-lb"})


@dataclass(frozen=True)
class VllmOptions:
    """What a start has to know of its engine."""

    parallel: Parallel = field(default_factory=Parallel)
    remote_code: bool = False
    """Whether vLLM runs a bundle's code."""
    lora: bool | None = None
    """Whether adapters are switched on or off; None: not given."""
    draft: Draft | None = None
    """The model that drafts; None: none does."""
    drain_seconds: int = 0
    """How long running requests may take when the server is told to stop (--shutdown-timeout)."""
    max_num_seqs: int | None = None
    """Requests in a batch; None: vLLM decides."""
    dtype: str | None = None
    """vLLM's name; None: vLLM decides."""
    quantization: str | None = None
    smaller_on_gpu: bool = False
    """Whether the weights take less of a GPU's memory than they take of the bundle."""
    tokenizer: bool = True
    """Whether vLLM reads a tokenizer."""
    hf_overrides: str | None = None
    """JSON."""
    pooler: bool = False
    """Whether it is given how to pool."""
    moe_backend: bool = False
    """Whether the kernels of mixtures of experts are chosen."""
    attention_backend: bool = False
    """Whether the kernels of attention are chosen."""


def options_of(arguments: Arguments) -> VllmOptions:
    """What `arguments` say. Raises ConfigurationError for what vLLM could not read either."""
    dtype = arguments.value("dtype")
    return VllmOptions(
        parallel=_parallel(arguments),
        remote_code=arguments.switch("trust-remote-code") or False,
        lora=arguments.switch("enable-lora"),
        draft=draft_of(arguments),
        drain_seconds=_bounded(
            arguments, "shutdown-timeout", 0, MOST_DRAIN_SECONDS, default=0, unit=" of seconds"
        ),
        max_num_seqs=_natural(arguments, "max-num-seqs"),
        dtype=None if dtype in {None, "auto"} else _DTYPES.get(str(dtype), dtype),
        quantization=arguments.value("quantization"),
        smaller_on_gpu=not _SMALLER_ON_GPU.isdisjoint(arguments.names),
        tokenizer=not (arguments.switch("skip-tokenizer-init") or arguments.switch("tokens-only")),
        hf_overrides=arguments.text("hf-overrides"),
        pooler="pooler-config" in arguments.names,
        moe_backend=_is_chosen(arguments, "moe-backend", "kernel-config"),
        attention_backend=_is_chosen(arguments, "attention-backend", "attention-config"),
    )


def _parallel(arguments: Arguments) -> Parallel:
    return Parallel(
        tensor=_positive(arguments, "tensor-parallel-size"),
        pipeline=_positive(arguments, "pipeline-parallel-size"),
        data=_size(arguments, "data-parallel-size") or 1,
        data_here=_size(arguments, "data-parallel-size-local"),
        nodes=_size(arguments, "nnodes") or 1,
        experts=arguments.switch("enable-expert-parallel") or False,
        by_ray="ray"
        in {
            arguments.value("distributed-executor-backend"),
            arguments.value("data-parallel-backend"),
        },
        one_replica=any(arguments.switch(name) for name in _ONE_REPLICA),
    )


def _positive(arguments: Arguments, name: str) -> int:
    return _bounded(arguments, name, 1, MOST_RANKS, default=1)


def _bounded(
    arguments: Arguments, name: str, low: int, high: int, *, default: int, unit: str = ""
) -> int:
    text = arguments.value(name)
    if text is None:
        return default
    number = _whole(text)
    if number is None or not low <= number <= high:
        raise ConfigurationError(
            f"--{name} {text[:40]!r} is not a whole number{unit} from {low} to {high}."
        )
    return number


def _size(arguments: Arguments, name: str) -> int | None:
    size = _natural(arguments, name)
    return size if size is not None and size <= MOST_RANKS else None


def _natural(arguments: Arguments, name: str) -> int | None:
    """vLLM itself refuses what is no number; here it counts as not given."""
    text = arguments.value(name)
    number = None if text is None else _whole(text)
    return number if number is not None and number >= 0 else None


def _whole(text: str) -> int | None:
    """As Python, and so vLLM, reads it; None for what is no whole number."""
    try:
        return int(text) if len(text) <= _MOST_DIGITS else None
    except ValueError:
        return None


def _is_chosen(arguments: Arguments, name: str, group: str) -> bool:
    """By the argument itself, or within a group ("--kernel-config.moe_backend")."""
    return group in arguments.names or arguments.value(name) not in {None, "auto"}
