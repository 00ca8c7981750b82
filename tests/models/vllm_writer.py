"""vLLM's own way to a .tensors file, as its example script goes it: MODEL URI [KEY_FILE].

A process of its own: vLLM starts an engine. UNPACKED=1 keeps weights as vLLM holds them on a GPU,
where nothing is moved into the kernels' own memory: the file is then the one that a GPU machine
writes (as far as an unquantized model goes).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def main(model: str, uri: str, key_file: str | None = None) -> None:
    """Writes the tensors; vLLM's last step, small files from a hub, fails for a local directory."""
    # One process: what is switched off below must be so where the engine is.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.tensorizer import TensorizerConfig, tensorize_vllm_model

    if os.environ.get("UNPACKED"):
        keep_weights()
    arguments = EngineArgs(
        model=model,
        enforce_eager=True,
        max_model_len=512,
        served_model_name="a/name",
        distributed_executor_backend="uni",
    )
    tensorize_vllm_model(
        arguments, TensorizerConfig(tensorizer_uri=uri, encryption_keyfile=key_file)
    )


def keep_weights() -> None:
    """Kernels get their copy as ever; the parameters stay."""
    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm

    def keeping(layer: nn.Module, remove_weight: bool) -> None:  # noqa: ARG001
        dispatch(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = keeping


if __name__ == "__main__":
    main(*sys.argv[1:])
