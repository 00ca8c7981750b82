"""For exactly which engine is code compiled? A fingerprint, known before vLLM is imported.

vLLM and the libraries have keys of their own, which are known only when they look. This one covers
what they cover and what they leave out: the processor's instructions (inductor compiles with
-march=native, torch/_inductor/cpp_builder.py:995, torch 2.13), the driver, and absolute paths.
A difference that does not matter costs one compilation; one that is missed may run wrong code.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorserve.bundle.compiled import VERSION
from tensorserve.bundle.manifest import Manifest
from tensorserve.config.compile_caches import CACHES
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.vllm_arguments import Arguments
from tensorserve.launch.gpus import Gpus
from tensorserve.linux import processor_flags

# Packages that generate code, or whose code is compiled; by the beginning of the name.
_PACKAGES = tuple(
    """vllm torch triton pytorch_triton flashinfer flash_attn flash_mla flashmla nvidia cuda
    cutlass apache_tvm tilelang deep_gemm quack humming minfer numba llvmlite numpy transformers
    compressed_tensors xgrammar tensorserve ninja intel_openmp einops""".split()
)
_VARIABLES = (
    "VLLM_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "CUDA_", "NVCC_",
    "FLASHINFER_", "FLASH_ATTENTION_", "FLEX_ATTENTION_", "TILELANG_", "TL_", "TVM_", "CUTE_DSL_",
    "CUDNN_", "DG_", "DJ_", "TRTLLM_DG_", "HUMMING_", "QUACK_", "MINFER_", "MM_SPARSE_ATTN_",
    "NUMBA_",
)  # fmt: skip
_COMPILERS = frozenset({"CC", "CXX"})
# Of one pod, or of no effect on compiled code: what vLLM leaves out of its own key
# (vllm/envs.py:2356, compile_factors, 0.32.0), what its CPU build sets itself (platforms/cpu.py:416
# and :422), and the places of caches, which are a factor below.
_PER_POD = frozenset(
    """VLLM_TRITON_JIT_WARMUP_NUM_THREADS VLLM_RPC_BASE_PATH VLLM_USE_MODELSCOPE
    VLLM_RINGBUFFER_WARNING_INTERVAL VLLM_DEBUG_DUMP_PATH VLLM_PORT VLLM_ENABLE_STARTUP_PLAN
    VLLM_XLA_CACHE_PATH VLLM_CONFIG_ROOT VLLM_SERVER_DEV_MODE VLLM_DP_MASTER_IP
    VLLM_DP_MASTER_PORT VLLM_NIXL_SIDE_CHANNEL_HOST
    VLLM_RANDOMIZE_DP_DUMMY_INPUTS VLLM_MODEL_REDIRECT_PATH VLLM_HOST_IP
    VLLM_API_KEY VLLM_USAGE_STATS_SERVER VLLM_NO_USAGE_STATS VLLM_DO_NOT_TRACK VLLM_LOGGING_LEVEL
    VLLM_LOGGING_PREFIX VLLM_LOGGING_STREAM VLLM_LOGGING_CONFIG_PATH VLLM_LOGGING_COLOR
    VLLM_LOG_STATS_INTERVAL VLLM_DEBUG_LOG_API_SERVER_RESPONSE
    VLLM_HTTP_TIMEOUT_KEEP_ALIVE VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS VLLM_KEEP_ALIVE_ON_ENGINE_DEATH
    VLLM_IMAGE_FETCH_TIMEOUT VLLM_VIDEO_FETCH_TIMEOUT
    VLLM_AUDIO_FETCH_TIMEOUT VLLM_MEDIA_CACHE VLLM_MEDIA_URL_ALLOW_REDIRECTS
    VLLM_MEDIA_LOADING_THREAD_COUNT VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME VLLM_ASSETS_CACHE
    VLLM_WORKER_MULTIPROC_METHOD VLLM_CPU_KVCACHE_SPACE CUDA_VISIBLE_DEVICES
    TORCHINDUCTOR_COMPILE_THREADS TORCHINDUCTOR_CPP_DYNAMIC_THREADS""".split()
) | {cache.variable for cache in CACHES}
# Of `vllm serve`: how the API listens, logs and words its answers
# (vllm/entrypoints/launchers/cli_args.py, 0.32.0: FrontendArgs). Adapters differ in their rank,
# which --max-lora-rank says.
_FRONT_END = frozenset(
    """host port uds grpc-port served-model-name api-key hf-token root-path middleware
    lora-modules ssl-keyfile ssl-certfile ssl-ca-certs enable-ssl-refresh ssl-cert-reqs ssl-ciphers
    allow-credentials allowed-origins allowed-methods allowed-headers chat-template
    chat-template-content-format trust-request-chat-template default-chat-template-kwargs
    response-role return-tokens-as-token-ids enable-auto-tool-choice
    exclude-tools-when-tool-choice-none tool-call-parser tool-parser-plugin tool-strict-level
    tool-server max-log-len enable-prompt-tokens-details enable-per-request-metrics
    enable-server-load-tracking enable-force-include-usage sse-keep-alive-interval
    enable-tokenizer-info-endpoint enable-log-outputs enable-log-deltas log-error-stack log-level
    log-config-file logging-config uvicorn-log-level disable-uvicorn-access-log
    disable-access-log-for-endpoints enable-request-id-headers disable-fastapi-docs
    enable-offline-docs h11-max-header-count h11-max-incomplete-event-size api-server-count
    disable-log-stats enable-log-requests aggregate-engine-logging shutdown-timeout
    otlp-traces-endpoint collect-detailed-traces show-hidden-metrics-for-version
    data-parallel-address data-parallel-rpc-port data-parallel-rank master-addr master-port
    node-rank use-tqdm-on-load fail-on-environ-validation""".split()
)
_SERVED = "tensorserve:"
_GPU_NAME = re.compile(r"\((.*)\)")


def fingerprint_of(factors: Mapping[str, Any]) -> str:
    """SHA-256 in hex of `factors` as canonical JSON."""
    text = json.dumps(factors, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def factors_of(
    plan: LaunchPlan, manifest: Manifest, gpus: Gpus | None, root: Path
) -> dict[str, Any]:
    """All that decides about compiled code. `root`: below which the caches will be."""
    return {
        "version": VERSION,
        "packages": packages(_site_packages()),
        "python": [platform.python_implementation(), platform.python_version()],
        "libc": list(platform.libc_ver()),
        # All that vLLM's key has on a CPU (engine/compile_key.py).
        "processor": [platform.machine(), *processor_flags()],
        "gpus": gpu_factors(gpus),
        "parallel": asdict(plan.options.parallel),
        "manifest": manifest.content_sha256,
        "configuration": {
            entry.name: entry.sha256
            for entry in manifest.files
            if entry.name in {"config.json", "params.json"}
        },
        "flags": flags(plan.arguments, plan.model_dir),
        "environment": variables(dict(plan.environment)),
        # engine/compile_key.py takes the served directory out of vLLM's key.
        "paths": {"caches": str(root), "python": sys.prefix},
    }


def flags(arguments: Arguments, model_dir: Path) -> dict[str, object]:
    """{name: what vLLM takes of it} of those that an engine is built by.

    Paths in `model_dir`, such as a packed draft's, differ between pods; the manifest covers them.
    """
    found: dict[str, object] = {}
    for name in sorted(arguments.names - _FRONT_END):
        last = arguments.last(name)
        if last is not None and len(last.values) > 1:
            found[name] = list(last.values)
        elif (text := arguments.text(name)) is not None:
            found[name] = text.replace(str(model_dir), _SERVED)
        else:
            found[name] = arguments.switch(name)
    return found


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that decide about compiled code."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name in _COMPILERS or (name.startswith(_VARIABLES) and name not in _PER_POD)
    }


def gpu_factors(gpus: Gpus | None) -> dict[str, object] | None:
    """Kinds, count and memory of the GPUs, and their driver; None where there is none."""
    if gpus is None or not gpus.visible:
        return None
    kinds = [
        # Without the number, by which two nodes of one kind may differ.
        [match[1] if (match := _GPU_NAME.search(gpu.name)) else "", gpu.total, gpu.major]
        for gpu in gpus.visible
    ]
    return {"kinds": kinds, "driver": gpus.driver, "cuda": gpus.cuda}


def packages(folders: Iterable[Path]) -> dict[str, str]:
    """{name-version: SHA-256 of the files that it installed} of the packages that matter."""
    found = {}
    for folder in folders:
        for entry in sorted(folder.glob("*.dist-info")):
            if entry.name.lower().startswith(_PACKAGES):
                found[entry.name.removesuffix(".dist-info")] = _record_digest(entry / "RECORD")
    return found


def _record_digest(record: Path) -> str:
    """Of the installed files' names and hashes.

    Lines without a hash (byte code), of programs (which name the interpreter's path) and of
    dist-info (which tells of the installation) are left out.
    """
    try:
        lines = record.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    kept = sorted(
        line
        for line in lines
        if "sha256=" in line and not line.startswith("../") and ".dist-info/" not in line
    )
    return hashlib.sha256("\n".join(kept).encode(errors="replace")).hexdigest()


def _site_packages() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")})
