"""Which kernels would vLLM download while serving, and which are used where it cannot?

On GPUs of compute capability 10 (B200, B300) vLLM 0.32.0 prefers FlashInfer's "trtllm-gen" kernels
for mixtures of experts (model_executor/layers/fused_moe/oracle) and for MLA (platforms/cuda.py,
platforms/interface.py). FlashInfer downloads them from NVIDIA's server when they are first used
(jit/cubin_loader.py). vLLM asks for that server before it takes them for other attention, and not
before it takes these: without it the engine ends after a minute of tries. Not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress

from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.vllm_arguments import Argument
from tensorserve.errors import ConfigurationError
from tensorserve.launch.gpus import Gpus

# FlashInfer's variable and its default (jit/cubin_loader.py, 0.7.0.post1).
_SERVER_VARIABLE = "FLASHINFER_CUBINS_REPOSITORY"
_SERVER = "https://edge.urm.nvidia.com/artifactory/sw-kernelinferencelibrary-public-generic-local/"
_SERVER_SECONDS = 5
# vLLM's variable: the kernels are installed.
_BROUGHT = "VLLM_HAS_FLASHINFER_CUBIN"
_MAJOR = 10
# transformers_utils/model_arch_config_convertor.py (0.32.0), get_num_experts
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_FP8, _FP4, _MARLIN = "triton", "cutlass", "marlin"
# By quantization method: the first of each oracle's backends that needs no download. Of the methods
# that are not named here none prefers these kernels.
_MOE_BACKENDS = {
    None: "triton",
    "fp8": _FP8,
    "modelopt": _FP8,
    "modelopt_fp4": _FP4,
    "modelopt_mxfp8": _MARLIN,
    "mxfp4": _MARLIN,
    "gpt_oss_mxfp4": _MARLIN,
    "mxfp8": _MARLIN,
}
_HINT = (
    "Let the container reach {server}, build the image with FLASHINFER_KERNELS=download, or {way}."
)


def without_downloads(
    plan: LaunchPlan,
    gpus: Gpus | None,
    config: Mapping[str, object],
    reachable: Callable[[str], bool] | None = None,
) -> tuple[LaunchPlan, str | None]:
    """`plan` with other kernels where those to download cannot be had, and what to say of it.

    `config`: the model's config.json. Flags that the user gave stand. Raises ConfigurationError for
    a model whose kernels cannot be replaced.
    """
    environment = dict(plan.environment)
    if gpus is None or not any(gpu.major == _MAJOR for gpu in gpus.visible):
        return plan, None
    flags = [*_for_experts(plan, config), *_for_mla(plan, config)]
    adapters = _experts(config) and _quantization(plan, config) is None and plan.options.lora
    if not flags and not adapters:
        return plan, None
    if environment.get(_BROUGHT, "0") == "1" or importlib.util.find_spec("flashinfer_cubin"):
        return plan, None
    server = environment.get(_SERVER_VARIABLE, _SERVER)
    if (reachable or _answers)(server):
        return plan, None
    if adapters:
        # select_unquantized_moe_backend (0.32.0) does not look at --moe-backend with adapters.
        raise ConfigurationError(
            "On this GPU vLLM takes kernels for a mixture of experts with LoRA adapters that it "
            f"downloads from {server}, which cannot be reached.",
            hint=_HINT.format(
                server=server,
                way="serve without adapters (TENSORSERVE_VLLM_ENABLE_LORA=false)",
            ),
        )
    shown = " ".join(word for flag in flags for word in flag.words())
    return plan.with_arguments(plan.arguments.adding(*flags)), (
        f"{server} cannot be reached, from which vLLM takes this model's kernels on this GPU: "
        f"others are used ({shown})."
    )


def _for_experts(plan: LaunchPlan, config: Mapping[str, object]) -> list[Argument]:
    if not _experts(config) or plan.options.moe_backend:
        return []
    backend = _MOE_BACKENDS.get(_quantization(plan, config))
    return [Argument("moe-backend", (backend,))] if backend else []


def _for_mla(plan: LaunchPlan, config: Mapping[str, object]) -> list[Argument]:
    """FlashInfer's MLA is the default, for decoding and for some models' prefill."""
    if not _holds(config, "kv_lora_rank") or plan.options.attention_backend:
        return []
    # The second for models that attend to some tokens only (DeepSeek-V3.2).
    backend = "FLASHMLA_SPARSE" if _holds(config, "index_topk") else "CUTLASS_MLA"
    return [
        Argument("attention-backend", (backend,)),
        Argument("attention-config", ("FLASH_ATTN",), keys="mla_prefill_backend"),
    ]


def _experts(config: Mapping[str, object]) -> bool:
    return any(_holds(config, name) for name in _EXPERTS)


def _holds(config: Mapping[str, object], name: str) -> bool:
    text = config.get("text_config")
    return bool(config.get(name) or (isinstance(text, dict) and text.get(name)))


def _quantization(plan: LaunchPlan, config: Mapping[str, object]) -> str | None:
    """vLLM's name of the method, as far as it decides; None for none."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config") or inner
    asked = plan.options.quantization
    if not isinstance(found, dict):
        return asked
    method = str(found.get("quant_method", asked)).lower()
    if method == "compressed-tensors":
        return _compressed(found)
    if method.startswith("modelopt"):
        algorithm = str(found.get("quant_algo", "")).upper()
        if "MXFP8" in algorithm:
            return "modelopt_mxfp8"
        return "modelopt_fp4" if "FP4" in algorithm else "modelopt"
    return method


def _compressed(found: Mapping[str, object]) -> str:
    """Its formats (compressed_tensors, config/format.py) by the methods that are alike."""
    groups = found.get("config_groups")
    formats = {str(found.get("format", ""))} | {
        str(group.get("format", ""))
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    }
    if any(name.startswith("nvfp4") for name in formats):
        return "modelopt_fp4"
    if any(name.startswith("mxfp4") for name in formats):
        return "mxfp4"
    return "fp8" if "float-quantized" in formats else "compressed-tensors"


def _answers(server: str) -> bool:
    """As vLLM asks (utils/flashinfer.py, has_nvidia_artifactory)."""
    with (
        suppress(OSError, ValueError),
        urllib.request.urlopen(server, timeout=_SERVER_SECONDS) as answer,
    ):
        return bool(answer.status == 200)
    return False
