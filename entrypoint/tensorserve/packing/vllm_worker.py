"""How does `pack --layout vllm` build the model inside vLLM and send each rank's parameters?

Run as ``python -m tensorserve.packing.vllm_worker JSON`` by packing/rank_parameters.py. vLLM's
executor starts the ranks, and vLLM's plugin mechanism calls `PackLoader` in each of them. No KV
cache is allocated, and nothing is post-processed, compiled or served.
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

from tensorserve.bundle.layout import RANK_MARKER
from tensorserve.engine.loader import fill
from tensorserve.engine.memory_writes import Watch
from tensorserve.engine.parameters import computed_buffers, held_tensors, plain_bytes
from tensorserve.engine.vllm_fingerprint import engine_fingerprint
from tensorserve.errors import TensorserveError
from tensorserve.packing.checkpoint import CheckpointReader, read_checkpoint
from tensorserve.packing.rank_parameters import LOAD_FORMAT, REQUEST


class PackLoader(BaseModelLoader):  # type: ignore[misc]
    """The model loader of load format `tensorserve-pack`; vLLM makes one in each rank."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._address: str = load_config.model_loader_extra_config["address"]
        self._source = Path(load_config.model_loader_extra_config["source"])
        self._watch = Watch()

    def download_model(self, model_config: ModelConfig) -> None:
        """Does nothing: the model is a local directory."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:  # noqa: ARG002
        """Loads the checkpoint's tensors with model.load_weights(), as for layout `hf`."""
        fill(self._watch, model, _tensors(self._source))

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Builds the model without post-processing; returns when its parameters have been read.

        Sends an error to `pack` instead of the parameters if the checkpoint does not fit.
        """
        connection = Client(self._address, "AF_UNIX")
        rank = get_tensor_model_parallel_rank()
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        try:
            with set_default_torch_dtype(model_config.dtype):
                with device, self._watch.birth():
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
    """The checkpoint's (name, tensor) pairs, one at a time."""
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
    """Answers requests for bytes of `tensors` until `pack` closes the connection."""
    number, data = -1, torch.empty(0, dtype=torch.uint8)
    while True:
        try:
            wanted, start, length = REQUEST.unpack(connection.recv_bytes())
            if wanted != number:
                number, data = wanted, plain_bytes(tensors[wanted])
            connection.send_bytes(data[start : start + length].cpu().numpy().data)
        except (EOFError, OSError):
            return


def main(
    model: str, source: str, dtype: str | None, ranks: int, address: str, trust_remote_code: bool
) -> None:
    """Builds the model in directory `model` with the weights of `source`, in `ranks` ranks.

    `source` is the same directory, or one safetensors file. Each rank connects to the Unix socket
    `address`.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor import Executor

    arguments = EngineArgs(
        model=model,
        dtype=dtype or "auto",
        tensor_parallel_size=ranks,
        load_format=LOAD_FORMAT,
        model_loader_extra_config={"address": address, "source": source},
        trust_remote_code=trust_remote_code,
        enforce_eager=True,
        # No KV cache is allocated, so that a device with little free memory is enough.
        gpu_memory_utilization=0.01,
        distributed_executor_backend="uni" if ranks == 1 else "mp",
    )
    config = arguments.create_engine_config()
    Executor.get_class(config)(config).shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
