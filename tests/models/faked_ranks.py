"""What each of two ranks makes of a checkpoint, and of what it does not leave out: MODEL KIND.

A process of its own: vLLM's groups of ranks are of the process. There is one rank; vLLM is told
that it is one of two, which is all that building and filling a model asks of the other. Prints
JSON: for each rank, a digest of all parameters for each way, and the bytes that were given.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from s3server import free_ports
from safetensors.torch import load_file

RANKS = 2


class Faked:
    """A group of ranks with another rank and size."""

    def __init__(self, group: Any, rank: int) -> None:
        self._group = group
        self.rank_in_group, self.world_size = rank, RANKS
        self.is_first_rank, self.is_last_rank = rank == 0, rank == RANKS - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def main(model: str, kind: str) -> None:
    """`kind`: "pipeline" or "expert"."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=model, enforce_eager=True, max_model_len=512).create_engine_config()
    (port,) = free_ports(1)
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo"
        )
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
    group = "_PP" if kind == "pipeline" else "_TP"
    real = getattr(parallel_state, group)
    found = []
    for rank in range(RANKS):
        setattr(parallel_state, group, Faked(real, rank))
        found.append([filled(model, kind, leave_out=leave_out) for leave_out in (False, True)])
    setattr(parallel_state, group, real)
    print(json.dumps(found))


def filled(model: str, kind: str, *, leave_out: bool) -> tuple[str, int]:
    """(digest of the parameters of a new model, bytes of the checkpoint that it was given)."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from tensorserve.engine.loader import fill
    from tensorserve.engine.memory_writes import Watch
    from tensorserve.engine.rank_filter import dropped_here

    config = EngineArgs(model=model, enforce_eager=True, max_model_len=512).create_engine_config()
    # Only afterwards: vLLM would look for the other rank's processor.
    if kind == "pipeline":
        config.parallel_config.pipeline_parallel_size = RANKS
    else:
        config.parallel_config.tensor_parallel_size = RANKS
        config.parallel_config.enable_expert_parallel = True
    given = 0
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        watch = Watch()
        with watch.birth():
            module = initialize_model(vllm_config=config)
        for parameter in module.parameters():
            parameter.data.zero_()
        dropped = dropped_here(module, balanced=False)

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal given
            for file in sorted(Path(model).glob("*.safetensors")):
                for name, tensor in load_file(file).items():
                    if not (leave_out and dropped(name)):
                        given += tensor.nbytes
                        yield name, tensor

        # Also asks whether all of this rank's parameters are filled.
        fill(watch, module, weights())
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), given


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    main(*sys.argv[1:])
