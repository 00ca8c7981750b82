"""`pack --layout vllm` inside vLLM: builds the model, fills it, and hands out its parameters.

Run as ``python -m tensorserve.vllm_packing JSON`` by engine_parameters.py: vLLM's own executor
starts the ranks, and in each of them its plugin mechanism gives `PackLoader` the model. No cache is
made and nothing is post-processed, compiled or served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from tensorserve.checkpoint import CheckpointReader, read_checkpoint
from tensorserve.engine_parameters import LOAD_FORMAT, REQUEST
from tensorserve.errors import TensorserveError
from tensorserve.layouts import RANK_MARKER
from tensorserve.vllm_fingerprint import engine_fingerprint
from tensorserve.vllm_loader import fill
from tensorserve.vllm_model import computed_buffers, held_tensors, plain_bytes


class PackLoader(BaseModelLoader):  # type: ignore[misc]
    """vLLM's load format `tensorserve-pack`. One is made in each rank."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._address: str = load_config.model_loader_extra_config["address"]
        self._source = Path(load_config.model_loader_extra_config["source"])

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: the model is a directory."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """As from a bundle of layout `hf`: the same tensors go through the same loaders."""
        fill(self, model, model_config, _tensors(self._source))

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """The model before post-processing; returns when its parameters have been taken."""
        connection = Client(self._address, "AF_UNIX")
        rank = get_tensor_model_parallel_rank()
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        try:
            with set_default_torch_dtype(model_config.dtype):
                with device:
                    model = self.create_model(vllm_config, model_config, prefix)
                computed = computed_buffers(model)
                self.load_weights(model, model_config)
            held = held_tensors(model, computed)
        except TensorserveError as error:
            said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
            connection.send_bytes(json.dumps({"rank": rank, "error": said}).encode())
            raise
        held[RANK_MARKER] = torch.zeros(1, dtype=torch.uint8)
        offer = {
            "rank": rank,
            "fingerprint": engine_fingerprint(vllm_config, model_config).to_json(),
            "tensors": [
                (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in held.items()
            ],
        }
        connection.send_bytes(json.dumps(offer).encode())
        _hand_out(connection, list(held.values()))
        ready: nn.Module = model.eval()
        return ready


def _tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, one after the other."""
    checkpoint = read_checkpoint(source)
    reader = CheckpointReader(checkpoint)
    try:
        for stored in checkpoint.tensors:
            data = torch.empty(stored.length, dtype=torch.uint8)
            if stored.length:
                reader.read_into(stored.name, 0, data.numpy().data)
            yield stored.name, data.view(getattr(torch, stored.dtype)).view(stored.shape)
    finally:
        reader.close()


def _hand_out(connection: Connection, tensors: list[torch.Tensor]) -> None:
    """Answers until the other side closes."""
    number, data = -1, torch.empty(0, dtype=torch.uint8)
    while True:
        try:
            wanted, start, length = REQUEST.unpack(connection.recv_bytes())
            if wanted != number:
                number, data = wanted, plain_bytes(tensors[wanted])
            connection.send_bytes(data[start : start + length].cpu().numpy().data)
        except (EOFError, OSError):
            return


def main(model: str, source: str, dtype: str | None, ranks: int, address: str) -> None:
    """Builds the model of directory `model`, with the weights of `source` (the same, or a file),
    in `ranks` ranks that answer at `address`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor import Executor

    arguments = EngineArgs(
        model=model,
        dtype=dtype or "auto",
        tensor_parallel_size=ranks,
        load_format=LOAD_FORMAT,
        model_loader_extra_config={"address": address, "source": source},
        enforce_eager=True,
        # No cache is made: a device whose memory others use as well will do.
        gpu_memory_utilization=0.01,
        distributed_executor_backend="uni" if ranks == 1 else "mp",
    )
    config = arguments.create_engine_config()
    Executor.get_class(config)(config).shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
