"""Kernels that vLLM would download, and what is used where NVIDIA's server cannot be reached.

Which flags vLLM knows is asked of the installed vLLM; that they run only a GPU can show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.gpus import Gpu, Gpus
from tensorserve.launch.trtllm_kernels import without_downloads

B200 = Gpus((Gpu("GPU 0 (NVIDIA B200)", major=10),), 1)
H100 = Gpus((Gpu("GPU 0 (NVIDIA H100)", major=9),), 1)
MIXTURE: dict[str, Any] = {"model_type": "qwen3_moe", "num_experts": 128}
MLA = ["--attention-backend=CUTLASS_MLA", "--attention-config.mla_prefill_backend=FLASH_ATTN"]


def plan(*arguments: str, **environment: str) -> LaunchPlan:
    made = make_plan(Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m"}), arguments)
    return replace(made, environment=tuple({**dict(made.environment), **environment}.items()))


def unreachable(_: str) -> bool:
    return False


def added(
    made: LaunchPlan, config: dict[str, Any], gpus: Gpus | None = B200
) -> tuple[list[str], str | None]:
    changed, said = without_downloads(made, gpus, config, unreachable)
    return list(changed.argv[len(made.argv) :]), said


@pytest.mark.parametrize(
    ("quantization", "backend"),
    [
        (None, "triton"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "triton"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "cutlass"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "triton"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "marlin"),
        ({"quant_method": "mxfp4"}, "marlin"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "triton"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}},
            },
            "cutlass",
        ),
    ],
)
def test_a_mixture_gets_kernels_of_the_image(quantization: object, backend: str) -> None:
    """On a B200 without the server, by how the experts are quantized; and it is said aloud."""
    flags, said = added(plan(), MIXTURE | {"quantization_config": quantization})
    assert flags == [f"--moe-backend={backend}"]
    assert said is not None
    assert "edge.urm.nvidia.com" in said
    assert f"--moe-backend={backend}" in said


def test_mla_gets_kernels_of_the_image() -> None:
    """DeepSeek: decoding, prefill and experts; nested configurations count as well."""
    deepseek = {"kv_lora_rank": 512, "n_routed_experts": 256}
    assert added(plan(), deepseek)[0] == ["--moe-backend=triton", *MLA]
    assert added(plan(), {"text_config": deepseek})[0] == ["--moe-backend=triton", *MLA]
    sparse = added(plan(), {"kv_lora_rank": 512, "index_topk": 2048})[0]
    assert sparse == ["--attention-backend=FLASHMLA_SPARSE", MLA[1]]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_methods_without_such_kernels_stay(method: str) -> None:
    """vLLM does not prefer a download for them."""
    quantization = {"quantization_config": {"quant_method": method}}
    assert added(plan(), MIXTURE | quantization) == ([], None)


@pytest.mark.parametrize("gpus", [None, H100, Gpus((Gpu("GPU 0"),), 1)])
def test_other_devices_are_left_alone(gpus: Gpus | None) -> None:
    """The CPU build, a Hopper, a GPU of which nothing is known."""
    assert added(plan(), MIXTURE, gpus) == ([], None)


def test_a_dense_model_is_left_alone() -> None:
    """vLLM asks for the server itself before it takes such kernels for other attention."""

    def asked(_: str) -> bool:
        raise AssertionError

    made = plan()
    assert without_downloads(made, B200, {"num_attention_heads": 8}, asked) == (made, None)


def test_what_the_user_chose_stands() -> None:
    """By the flag, or within its group."""
    deepseek = {"kv_lora_rank": 512, "n_routed_experts": 256}
    chosen = plan("--moe-backend=flashinfer_trtllm", "--attention-config.backend=FLASHINFER_MLA")
    assert added(chosen, deepseek) == ([], None)
    assert added(plan("--moe-backend", "auto"), MIXTURE)[0] == ["--moe-backend=triton"]


def test_nothing_changes_where_kernels_are() -> None:
    """The server answers, or somebody brought them."""
    made = plan()
    assert without_downloads(made, B200, MIXTURE, lambda _: True) == (made, None)
    assert added(plan(VLLM_HAS_FLASHINFER_CUBIN="1"), MIXTURE) == ([], None)


def test_the_server_of_the_environment_is_asked() -> None:
    """FlashInfer's own variable names a mirror."""
    asked: list[str] = []

    def ask(server: str) -> bool:
        asked.append(server)
        return True

    mirror = "http://mirror.internal/cubins/"
    without_downloads(plan(FLASHINFER_CUBINS_REPOSITORY=mirror), B200, MIXTURE, ask)
    assert asked == [mirror]


def test_adapters_on_a_mixture_are_refused() -> None:
    """vLLM asks no flag there: 78 before it starts, and what to do."""
    with pytest.raises(ConfigurationError) as refused:
        added(plan("--enable-lora"), MIXTURE)
    assert "cannot be reached" in refused.value.message
    assert "TENSORSERVE_VLLM_ENABLE_LORA=false" in str(refused.value.hint)


def test_vllm_knows_each_backend_for_its_method() -> None:
    """Names of the installed vLLM, by the oracle that would be asked."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8, mxfp4, mxfp8, nvfp4, unquantized
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    asked: list[tuple[Callable[[Any], object], str]] = [
        (unquantized.map_unquantized_backend, "triton"),
        (fp8.map_fp8_backend, "triton"),
        (nvfp4.map_nvfp4_backend, "cutlass"),
        (mxfp4.map_mxfp4_backend, "marlin"),
        (mxfp8._BACKEND_NAME_MAP.__getitem__, "marlin"),
    ]
    for backend, name in asked:
        assert "TRTLLM" not in str(backend(name))
    assert {"CUTLASS_MLA", "FLASHMLA_SPARSE"} <= set(AttentionBackendEnum.__members__)
    assert "FLASH_ATTN" in MLAPrefillBackendEnum.__members__
