"""A worker raises while another waits for it: vLLM waits for ever, and a start does not.

A tiny random Llama with two ranks. A plugin of vLLM's makes one of them fail after its load.
"""

from __future__ import annotations

from pathlib import Path

import torch
from running import Tensorserve
from tiny_models import llama

from tensorserve.packing.pack import pack
from tensorserve.sources import Access

# Rank 1 raises in its profiling run, in which rank 0 waits for it in a collective.
PLUGIN = """
import torch

def register():
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.v1.worker.cpu_worker import CPUWorker

    def fail(self):
        if self.rank == 1:
            raise RuntimeError("made to fail")
        print("rank 0 waits", flush=True)
        get_tp_group().all_reduce(torch.ones(4096, dtype=torch.bfloat16))

    CPUWorker.determine_available_memory = fail
"""


def test_a_worker_that_raises_while_another_waits_for_it(tmp_path: Path, model_dir: Path) -> None:
    """F18: the start ends with 70, the reason and what the worker raised; nothing is left."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    llama(tiny, model_dir, torch.bfloat16, tied=True)
    bundle = tmp_path / "bundle"
    pack(tiny, str(bundle), access=Access())
    plugins = tmp_path / "plugins"
    installed = plugins / "made_to_fail-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: made-to-fail\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nmade_to_fail = made_to_fail:register\n"
    )
    (plugins / "made_to_fail.py").write_text(PLUGIN)
    environ = {
        "PYTHONPATH": str(plugins),
        # One core for each rank: vLLM would otherwise give both the same ones.
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "2",
    }
    with Tensorserve(tmp_path, environ) as engine:
        assert engine.process is not None
        assert engine.process.wait(150) == 70, engine.text[-4000:]
    assert "rank 0 waits" in engine.text
    failures = [event for event in engine.events() if event["event"] == "failure"]
    assert [event["reason"] for event in failures] == ["worker_lost"]
    assert "rank 1 raised RuntimeError: made to fail" in failures[0]["message"]
    assert failures[0]["message"] in engine.text
