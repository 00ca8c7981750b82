"""What a rank leaves out of a checkpoint: only what vLLM drops there, and never by a guess.

The modules are vLLM's own, without the weights that they would need a model for.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

LAYER = "model.layers.{}.mlp.{}"


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """Imported late: vLLM takes seconds."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

    from tensorserve.engine.rank_filter import dropped_here

    return SimpleNamespace(
        RoutedExperts=RoutedExperts,
        PPMissingLayer=PPMissingLayer,
        WeightsMapper=WeightsMapper,
        dropped_here=dropped_here,
    )


def experts(vllm: SimpleNamespace, *places: int) -> nn.Module:
    """vLLM's experts of a layer; `places` says where each is on this rank, -1 for elsewhere."""
    routed = vllm.RoutedExperts.__new__(vllm.RoutedExperts)
    nn.Module.__init__(routed)
    expert_map = torch.tensor(places) if places else None
    routed.expert_map_manager = SimpleNamespace(expert_map=expert_map)
    runner = nn.Module()
    runner.routed_experts = routed
    return runner


def model(vllm: SimpleNamespace, *, name: str = "model", places: tuple[int, ...] = ()) -> Any:
    """Layer 0 of another pipeline stage, layer 1 with experts here."""
    top, inner, layer, mlp = nn.Module(), nn.Module(), nn.Module(), nn.Module()
    mlp.experts = experts(vllm, *places)
    layer.mlp = mlp
    inner.layers = nn.ModuleList([vllm.PPMissingLayer(), layer])
    inner.embed_tokens = vllm.PPMissingLayer()
    top.add_module(name, inner)
    top.lm_head = vllm.PPMissingLayer()
    return top


def test_layers_of_other_stages_are_dropped(vllm: SimpleNamespace) -> None:
    """Not layer 1, nor 10, nor what a tied head may be made of."""
    dropped = vllm.dropped_here(model(vllm), balanced=False)
    assert dropped("model.layers.0.mlp.up_proj.weight")
    assert not dropped("model.layers.1.mlp.up_proj.weight")
    assert not dropped("model.layers.00.mlp.up_proj.weight")
    assert not dropped("model.embed_tokens.weight")
    assert not dropped("lm_head.weight")
    assert not dropped("vision.layers.0.mlp.up_proj.weight")


def test_experts_of_other_ranks_are_dropped(vllm: SimpleNamespace) -> None:
    """Their weights alone: some kernels want the scales of all."""
    dropped = vllm.dropped_here(model(vllm, places=(-1, -1, 0, 1)), balanced=False)
    assert dropped(LAYER.format(1, "experts.0.gate_proj.weight"))
    assert dropped(LAYER.format(1, "experts.1.down_proj.weight_packed"))
    assert not dropped(LAYER.format(1, "experts.2.gate_proj.weight"))
    assert not dropped(LAYER.format(1, "experts.0.gate_proj.weight_scale"))
    assert not dropped(LAYER.format(1, "experts.0.gate_proj.input_scale"))


@pytest.mark.parametrize(
    "name",
    [
        "experts.gate_up_proj",  # all experts in one
        "shared_experts.0.gate_proj.weight",
        "experts.4.gate_proj.weight",  # vLLM has no such expert
        "gate.weight",
    ],
)
def test_what_is_no_single_expert_is_read(vllm: SimpleNamespace, name: str) -> None:
    dropped = vllm.dropped_here(model(vllm, places=(-1, -1, 0, 1)), balanced=False)
    assert not dropped(LAYER.format(1, name))


def test_another_layers_experts_are_not_these(vllm: SimpleNamespace) -> None:
    """Layers of a draft (MTP) stand behind the model's own: it is unknown where they go."""
    dropped = vllm.dropped_here(model(vllm, places=(-1, 0)), balanced=False)
    assert not dropped(LAYER.format(2, "experts.0.gate_proj.weight"))


def test_experts_that_move_while_serving_are_all_read(vllm: SimpleNamespace) -> None:
    """EPLB."""
    dropped = vllm.dropped_here(model(vllm, places=(-1, 0)), balanced=True)
    assert not dropped(LAYER.format(1, "experts.0.gate_proj.weight"))


def test_without_expert_parallelism_all_are_here(vllm: SimpleNamespace) -> None:
    dropped = vllm.dropped_here(model(vllm), balanced=False)
    assert not dropped(LAYER.format(1, "experts.0.gate_proj.weight"))


def test_a_models_own_names_for_its_layers_count(vllm: SimpleNamespace) -> None:
    """As vLLM maps a checkpoint's names; what it maps to nothing it may still look at."""
    one = model(vllm, name="language_model", places=(-1, 0))
    one.hf_to_vllm_mapper = vllm.WeightsMapper(
        orig_to_new_prefix={"model.": "language_model.", "old.": None}
    )
    dropped = vllm.dropped_here(one, balanced=False)
    assert dropped("model.layers.0.mlp.up_proj.weight")
    assert dropped(LAYER.format(1, "experts.0.gate_proj.weight"))
    assert not dropped(LAYER.format(1, "experts.1.gate_proj.weight"))
    assert not dropped("old.layers.0.mlp.up_proj.weight")


def test_what_a_model_says_that_it_does_not_use_is_left_out(vllm: SimpleNamespace) -> None:
    """Qwen3-Next's MTP layers, which are in their model's checkpoint, say it of all others."""
    one = nn.Module()
    one.is_unused_checkpoint_weight = lambda name: not name.startswith("mtp.")
    dropped = vllm.dropped_here(one, balanced=False)
    assert dropped("model.layers.0.mlp.up_proj.weight")
    assert not dropped("mtp.layers.0.mlp.up_proj.weight")


def test_the_plugin_may_be_called_in_the_middle_of_vllms_imports() -> None:
    """vLLM looks at a model's class in a process of its own, which imports that first."""
    program = (
        "from tensorserve.vllm_plugin import register; register(); "
        "import vllm.model_executor.models.qwen3_moe; "
        "from vllm.model_executor.model_loader import get_model_loader; "
        "from vllm.config.load import LoadConfig; "
        "print(type(get_model_loader(LoadConfig(load_format='dummy'))).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == ["DummyModelLoader"], done.stderr[-2000:]
