"""Which variables the engine, the exporter and supervisord may see: an allow-list."""

from __future__ import annotations

from collections.abc import Mapping

# vLLM's own names for what we take as TENSORSERVE_VLLM_<FLAG>.
FLAG_ALIASES = {"VLLM_API_KEY": "api-key", "HF_TOKEN": "hf-token"}

# What a child may inherit. An allow-list, because a container's environment is where secrets live.
CHILD_NAMES = frozenset(
    """PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TERM NO_COLOR COLUMNS LINES HOSTNAME
    LD_LIBRARY_PATH LD_PRELOAD CC CXX MAX_JOBS PYTHONPATH PYTHONUNBUFFERED PYTHONHASHSEED
    PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX VIRTUAL_ENV NO_PROXY no_proxy SSL_CERT_FILE
    SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    AWS_PROFILE AWS_DEFAULT_PROFILE AWS_REGION AWS_DEFAULT_REGION AWS_ROLE_ARN
    AWS_ROLE_SESSION_NAME AWS_WEB_IDENTITY_TOKEN_FILE AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE
    AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_CONTAINER_CREDENTIALS_FULL_URI
    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_CA_BUNDLE AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3
    AWS_ENDPOINT_URL_STS AWS_STS_REGIONAL_ENDPOINTS AWS_EC2_METADATA_DISABLED
    AWS_EC2_METADATA_SERVICE_ENDPOINT AWS_METADATA_SERVICE_TIMEOUT
    AWS_METADATA_SERVICE_NUM_ATTEMPTS""".split()
)
CHILD_PREFIXES = (
    "LC_", "XDG_", "VLLM_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "OMP_", "MKL_", "KMP_",
    "OPENBLAS_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "HF_", "TRANSFORMERS_",
    "TOKENIZERS_", "RAY_", "MALLOC_",
    # What compiles kernels while serving: where it caches them, and how.
    "FLASHINFER_", "FLASH_ATTENTION_", "FLEX_ATTENTION_", "TILELANG_", "TL_", "TVM_", "CUTE_DSL_",
    "CUDNN_", "DG_", "DJ_", "TRTLLM_DG_", "HUMMING_", "QUACK_", "MINFER_", "MM_SPARSE_ATTN_",
    "NUMBA_", "NVCC_", "NVSHMEM_",
)  # fmt: skip
CHILD_NEVER = frozenset(FLAG_ALIASES) | {"HUGGING_FACE_HUB_TOKEN"}


def child_environment(
    environ: Mapping[str, str], pass_env: tuple[str, ...] | None
) -> tuple[tuple[str, str], ...]:
    """The part of `environ` that the engine, the exporter and supervisord may see."""
    allowed = {
        name: value
        for name, value in environ.items()
        if name not in CHILD_NEVER
        and (name in CHILD_NAMES or name.startswith(CHILD_PREFIXES) or name in (pass_env or ()))
    }
    return tuple(sorted(allowed.items()))
