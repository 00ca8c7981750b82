"""Which checkpoints fill the model that vLLM makes of their directory: DIRECTORY…

A process of its own: vLLM's groups of ranks are of the process. Standard input: JSON, a list of
[directory, names of the tensors to leave out, arguments of vLLM's engine]. Prints one line of JSON
for each: "filled", or what the loader says, or what vLLM said while it made the model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from s3server import free_ports
from safetensors.torch import load_file


def main() -> None:
    """One process for all: vLLM's imports take most of the time."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    (port,) = free_ports(1)
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo"
        )
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
    for directory, left_out, arguments in json.load(sys.stdin):
        print("result:" + json.dumps(outcome(directory, set(left_out), arguments)), flush=True)


def outcome(directory: str, left_out: set[str], arguments: dict[str, Any]) -> str:
    """What comes of filling a new model with the checkpoint but `left_out`."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from tensorserve.engine.loader import fill
    from tensorserve.engine.memory_writes import Watch
    from tensorserve.errors import TensorserveError

    given = {"enforce_eager": True, "max_model_len": 128} | arguments
    watch = Watch()
    try:
        config = EngineArgs(model=directory, **given).create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            with torch.device("cpu"), watch.birth():
                model = initialize_model(vllm_config=config)
            fill(watch, model, tensors(Path(directory), left_out))
    except TensorserveError as error:
        return f"{error.exit_code} {error.message}"
    except Exception as error:  # noqa: BLE001 - what vLLM cannot build here is an outcome
        return f"vLLM: {type(error).__name__}: {str(error)[:300]}"
    return "filled"


def tensors(directory: Path, left_out: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's, in the order of its files."""
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name not in left_out:
                yield name, tensor


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    main()
