"""Do the weights fit into the devices' memory, and their load into the host's?"""

from __future__ import annotations

from tensorserve.cgroup_memory import available_bytes
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.ranks import Ranks
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.gpus import Gpus
from tensorserve.launch.memory_budget import automatic_limit, largest_needs
from tensorserve.launch.prefetch_process import may_share
from tensorserve.launch.preflight.results import Passed, Weights
from tensorserve.launch.preflight.vllm_build import engine_is_cpu
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.telemetry import Check


def check_memory(
    data_bytes: int, ranks: Ranks | None = None, gpus: Gpus | None = None, *, whole: bool = True
) -> Passed:
    """The weights fit into the memory of the devices that will hold them; each rank a part.

    `whole` is False where vLLM itself makes them smaller, or leaves a part in host memory.
    """
    ranks = ranks or Ranks()
    if engine_is_cpu():
        return _check_on_host(data_bytes, ranks)
    if gpus is None:
        return Passed(Check.MEMORY, "not known")
    share = ranks.part(data_bytes)
    which = "The weights are" if ranks.parts == 1 else f"A rank's part of {ranks.parts} is"
    used = gpus.visible[: 1 if ranks.here is None else ranks.here]
    if any(gpu.unified for gpu in used):
        return _check_on_host(data_bytes, ranks)
    for gpu in used:
        if whole and gpu.total is not None and share > gpu.total:
            raise ConfigurationError(
                f"{which} {share / 1e9:.2f} GB, {gpu.name} has {gpu.total / 1e9:.2f} GB.",
                hint="Use a larger GPU, a smaller or quantized model, or more GPUs with "
                "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE.",
            )
        if whole and gpu.total is not None and gpu.free is not None and share > gpu.free:
            raise ConfigurationError(
                f"{which} {share / 1e9:.2f} GB, {gpu.name} has {gpu.free / 1e9:.2f} GB free of "
                f"{gpu.total / 1e9:.2f} GB.",
                hint="Another process holds the rest: `nvidia-smi` on the host shows it. Stop it, "
                "or choose another GPU with CUDA_VISIBLE_DEVICES.",
            )
    known = [gpu for gpu in used if gpu.total is not None and gpu.free is not None]
    if not known:
        return Passed(Check.MEMORY, f"not known ({used[0].trouble})" if used else "not known")
    least = min(known, key=lambda gpu: gpu.free or 0)
    of = "" if ranks.parts == 1 else " for each rank"
    return Passed(
        Check.MEMORY,
        f"{share / 1e9:.2f} GB{of}, {least.name} has {(least.free or 0) / 1e9:.2f} GB free of "
        f"{(least.total or 0) / 1e9:.2f} GB",
    )


def _check_on_host(data_bytes: int, ranks: Ranks) -> Passed:
    available = available_bytes()
    if available is None:
        return Passed(Check.MEMORY, "not known")
    # Each data-parallel replica on this machine has the weights for itself.
    share = (
        data_bytes // ranks.machines if ranks.here is None else ranks.part(data_bytes) * ranks.here
    )
    which = "The weights are" if share == data_bytes else "This machine's part of the weights is"
    if share > data_bytes:
        which = f"The weights of {ranks.here} ranks are"
    if share > available:
        raise ConfigurationError(
            f"{which} {share / 1e9:.2f} GB, host memory has {available / 1e9:.2f} GB.",
            hint="Use a larger machine, a smaller or quantized model, or more machines.",
        )
    return Passed(Check.MEMORY, f"{share / 1e9:.2f} GB of {available / 1e9:.2f} GB in host memory")


def check_host_memory(settings: Settings, plan: LaunchPlan, weights: Weights) -> tuple[int, Passed]:
    """(bytes of host memory that the load may take, how they came about).

    Raises ConfigurationError where ranks on GPUs hold tensors as a whole in more than there is.
    """
    name, limit = Check.HOST_MEMORY, settings.host_memory_limit
    ranks, available = plan.options.parallel.ranks, available_bytes()
    if limit is not None:
        _check_largest(settings, plan, weights, limit, available)
        found = f"{limit / 1e9:.2f} GB, as TENSORSERVE_HOST_MEMORY_LIMIT says"
        return limit, Passed(name, found + _shared(settings, plan, weights))
    # It is not known yet on which machines Ray will place them.
    here = max(1, ranks.parts // ranks.machines) if ranks.here is None else ranks.here
    fetches = may_share(weights.shards) and (settings.prefetch != "off" or here > 1)
    held = ranks.part(weights.data_bytes + weights.draft_bytes) * here if engine_is_cpu() else 0
    limit = automatic_limit(available, here, held=held, fetches=fetches)
    _check_largest(settings, plan, weights, limit, available)
    known = "not known how much is" if available is None else f"{available / 1e9:.2f} GB"
    found = f"{limit / 1e9:.2f} GB for {here} rank(s), automatic: {known} available"
    return limit, Passed(name, found + _shared(settings, plan, weights))


def _shared(settings: Settings, plan: LaunchPlan, weights: Weights) -> str:
    """What is known of it before the ranks agree (engine/load_sharing.py)."""
    ranks = plan.tensor_parallel_size
    wished = settings.share_load == "on" and settings.loader != "reference"
    if not wished or ranks == 1 or len(weights.shards) > 1:
        return ""
    return f"; on one machine, {ranks} ranks open a part of the file each"


def _check_largest(
    settings: Settings, plan: LaunchPlan, weights: Weights, limit: int, available: int | None
) -> None:
    ranks = plan.options.parallel.ranks
    if engine_is_cpu() or available is None or ranks.here is None:
        return
    largest = weights.largest_bytes
    parallel = plan.tensor_parallel_size > 1 or plan.options.parallel.experts
    if weights.sliced and parallel and largest > DEFAULTS.sliced_bytes:
        why = "to take its slice of it"
    elif settings.loader == "reference":
        why = "as TENSORSERVE_LOADER=reference reads it"
    elif any(shard.check_digests for shard in weights.shards):
        why = "to compare its digest"
    else:
        return
    needed = largest_needs(largest, ranks.here, limit)
    if needed > available:
        raise ConfigurationError(
            f"Each rank holds the largest tensor, {largest / 1e9:.2f} GB, in host memory as a "
            f"whole, {why}: the load takes {needed / 1e9:.2f} GB for {ranks.here} rank(s) on this "
            f"machine, and {available / 1e9:.2f} GB are available.",
            hint="Give the container more memory, run fewer ranks on the machine, or set "
            "TENSORSERVE_HOST_MEMORY_LIMIT lower: half of it counts here.",
        )
