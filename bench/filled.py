"""What does it cost to follow which parameters are filled? `python -m bench.filled`.

vLLM makes two models and takes their tensors from this process's memory, which is as fast as no
source is: once as it does, once watched as our loader watches it, in turns. Seconds and seconds of
processor time of both, and the ratio. No engine is started; a minute or two, 4 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

# Gigabytes in few tensors, and thousands of tensors of a few kilobytes.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense, 1.2 GB": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
    "6144 tensors of experts": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
    ),
}


def main() -> None:
    """Prints a table, and writes the samples to --output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    start_vllm()
    results: dict[str, Any] = {"load_average": os.getloadavg()}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measured(name, Path(directory), arguments.repetitions)
    for name, samples in results.items():
        if name == "load_average":
            continue
        print(name)
        for step in ("make", "fill", "check", "processor"):
            plain = median(each[step] for each in samples["plain"])
            watched = median(each[step] for each in samples["watched"])
            ratio = f", ratio {watched / plain:.2f}" if plain > 1e-4 else ""
            print(f"  {step:10} {plain:7.3f} s plain {watched:7.3f} s watched{ratio}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


def start_vllm() -> None:
    """Creates the process groups of one rank, which vLLM's layers need."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo"
        )
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")


def measured(name: str, directory: Path, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """The samples of both ways, alternating, after one load of each that is not measured."""
    import transformers
    from vllm.engine.arg_utils import EngineArgs

    configuration, model, sizes = MODELS[name]
    config = getattr(transformers, configuration)(**sizes)
    config.architectures, config.dtype = [model], torch.bfloat16
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = getattr(transformers, model)(config).state_dict()
    tensors = {}
    for key, shape in shapes.items():
        if ".experts." not in key:
            tensors[key] = torch.zeros(shape.shape, dtype=torch.bfloat16)
            continue
        # transformers keeps the experts of a layer in one tensor; checkpoints do not.
        layer, kind = key.rsplit(".", 1)
        for number, expert in enumerate(torch.zeros(shape.shape, dtype=torch.bfloat16)):
            base = f"{layer}.{number}"
            if kind == "down_proj":
                tensors[f"{base}.down_proj.weight"] = expert
            else:
                gate, up = expert.chunk(2)
                tensors |= {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
    vllm = EngineArgs(model=str(directory), enforce_eager=True, skip_tokenizer_init=True)
    ways: dict[str, list[dict[str, float]]] = {"plain": [], "watched": []}
    for number in range(repetitions + 1):
        for way, samples in ways.items():
            # A configuration for each: vLLM notes in it which layers it has made.
            config = vllm.create_engine_config()
            sample = load(config, tensors, watched=way == "watched")
            if number:
                samples.append(sample)
    return ways


def load(config: Any, tensors: dict[str, torch.Tensor], *, watched: bool) -> dict[str, float]:
    """Seconds of each step, and of processor time of all."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from tensorserve.engine.filled import refuse_unfilled
    from tensorserve.engine.memory_writes import Watch
    from tensorserve.engine.parameters import give

    watch = Watch()
    found: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[step] = time.perf_counter() - started
        return result

    def make() -> Any:
        with watch.birth() if watched else nullcontext():
            return initialize_model(vllm_config=config)

    def fill() -> Any:
        with watch.load(model, every_operation=False) if watched else nullcontext():
            return give(model, all_of(tensors))

    before = time.process_time()
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
        torch.device("cpu"),
    ):
        model = timed("make", make)
        reported = timed("fill", fill)
        timed("check", lambda: refuse_unfilled(watch, model, reported) if watched else None)
    found["processor"] = time.process_time() - before
    return found


def all_of(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """An iterator, as loaders give one."""
    yield from tensors.items()


if __name__ == "__main__":
    main()
