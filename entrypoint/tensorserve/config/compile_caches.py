"""Where is the code that vLLM and its libraries compile kept between two starts?

`CACHES` lists every cache with the variable that moves it. All of them can be below one root. The
root is XDG_CACHE_HOME, as for vLLM itself (vllm/envs.py, 0.32.0: VLLM_CACHE_ROOT is
$XDG_CACHE_HOME/vllm by default). The images set it. docs/caches.md says what makes each cache
invalid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT_VARIABLE = "XDG_CACHE_HOME"


class CompileCache(NamedTuple):
    """One cache of compiled code."""

    variable: str
    """The variable from which its library reads the place."""
    subfolder: str
    """The place below the root. No cache is inside of another one."""
    holds: str
    """What is in it, for people."""


# The CUDA libraries' variables have no effect in the CPU build.
CACHES = (
    CompileCache(
        "VLLM_CACHE_ROOT",
        "vllm",
        "vLLM: models compiled by torch.compile, autotuning of FlashInfer, infos of model classes, "
        "memory profiles",
    ),
    CompileCache(
        "TORCHINDUCTOR_CACHE_DIR", "torchinductor", "torch.compile outside of vLLM's own cache"
    ),
    CompileCache("TRITON_CACHE_DIR", "triton", "Triton: kernels for one kind of GPU"),
    CompileCache("TORCH_EXTENSIONS_DIR", "torch_extensions", "torch: extensions in C++ and CUDA"),
    CompileCache("TVM_FFI_CACHE_DIR", "tvm-ffi", "TVM FFI: the bridge to torch's tensors"),
    CompileCache("NUMBA_CACHE_DIR", "numba", "Numba: functions for the CPU"),
    CompileCache("CUDA_CACHE_PATH", "cuda", "the driver: machine code made from PTX"),
    CompileCache("CUDA_TILE_CACHE_DIR", "cutile", "cuTile: kernels"),
    CompileCache("CUTE_DSL_CACHE_DIR", "cute_dsl", "CuTe DSL: kernels"),
    CompileCache("CUDNN_FRONTEND_GEMM_KERNEL_CACHE", "cudnn", "cuDNN front end: GEMM kernels"),
    CompileCache("DG_JIT_CACHE_DIR", "deep_gemm", "DeepGEMM: kernels"),
    CompileCache("TRTLLM_DG_CACHE_DIR", "trtllm_deep_gemm", "TensorRT-LLM's DeepGEMM: kernels"),
    # FlashInfer appends .cache/flashinfer to it.
    CompileCache("FLASHINFER_WORKSPACE_BASE", "flashinfer", "FlashInfer: modules built by ninja"),
    CompileCache(
        "FLASHINFER_MOE_EP_KNOB_CACHE",
        "flashinfer_moe_ep/knobs.json",
        "FlashInfer: tuning of expert parallelism (a file)",
    ),
    CompileCache(
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
        "flash_attention_cute_dsl",
        "FlashAttention: kernels in the CuTe DSL",
    ),
    CompileCache(
        "FLEX_ATTENTION_CUTE_DSL_CACHE_DIR",
        "flex_attention_cute_dsl",
        "FlexAttention: kernels in the CuTe DSL",
    ),
    CompileCache("HUMMING_CACHE_DIR", "humming/cache", "Humming: kernels"),
    CompileCache("HUMMING_TMP_DIR", "humming/tmp", "Humming: sources while they are compiled"),
    CompileCache("MINFER_FMHA_CACHE_DIR", "minfer/fmha_sm100", "MInfer: attention kernels"),
    CompileCache("MM_SPARSE_ATTN_AOT_CACHE", "minfer/mm_sparse_attn", "MInfer: sparse attention"),
    CompileCache("QUACK_CACHE_DIR", "quack", "QuACK: kernels in the CuTe DSL"),
    CompileCache("TILELANG_CACHE_DIR", "tilelang", "TileLang: kernels"),
)

# numba/core/config.py:279 reads its variable when it is imported.
_READ_BY_IMPORT = frozenset({"NUMBA_CACHE_DIR"})
MOVED = frozenset(cache.variable for cache in CACHES) - _READ_BY_IMPORT
"""Variables that launch/compiled_cache.py changes when vLLM may have been imported already."""
READ_AT_USE = frozenset(
    {
        "VLLM_CACHE_ROOT",  # vllm/envs.py:712, vLLM 0.32.0
        "TORCHINDUCTOR_CACHE_DIR",  # torch/_inductor/runtime/cache_dir_utils.py:15, torch 2.13
        "TORCH_EXTENSIONS_DIR",  # torch/utils/cpp_extension.py:2800
        "TRITON_CACHE_DIR",  # triton/knobs.py, env_str
        "TVM_FFI_CACHE_DIR",  # tvm_ffi/cpp/extension.py:758
    }
)
"""Those that an import does not read. Of the CUDA libraries' this is not known for all."""


def cache_root(environment: Mapping[str, str]) -> Path | None:
    """The folder below which all caches are; None where each library has its own default.

    A relative XDG_CACHE_HOME is ignored, as its specification says (XDG Base Directory 0.8).
    """
    root = Path(environment.get(ROOT_VARIABLE, ""))
    return root if root.is_absolute() else None


def cache_variables(root: Path) -> dict[str, str]:
    """The variables that put every cache below `root`."""
    return {cache.variable: str(root / cache.subfolder) for cache in CACHES}
