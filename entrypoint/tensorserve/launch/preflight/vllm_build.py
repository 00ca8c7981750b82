"""Which vLLM is installed: its version, and for which devices it was built?"""

from __future__ import annotations

import re
from importlib import metadata

from tensorserve.config import vllm_flags
from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight.results import Passed
from tensorserve.telemetry import Check

# What vLLM's wheels are built with where their version does not say it ("0.32.0+cu129").
_CUDA = 13


def check_vllm() -> Passed:
    """vLLM is installed, in the version that this release was tested with."""
    if vllm_release() != vllm_flags.VLLM_VERSION:
        raise ConfigurationError(
            f"vLLM {vllm_version()} is installed; this release is made for "
            f"{vllm_flags.VLLM_VERSION}.",
            hint=f"pip install vllm=={vllm_flags.VLLM_VERSION}",
        )
    return Passed(Check.VLLM, vllm_version())


def engine_is_cpu() -> bool:
    """Whether the installed vLLM is the CPU build (its version says so: "0.32.0+cpu")."""
    return "cpu" in vllm_version()


def built_for_cuda() -> int:
    """The major version of the CUDA that it was built with."""
    built = re.search(r"\+cu(\d+)\d$", vllm_version())
    return int(built[1]) if built else _CUDA


def vllm_release() -> str:
    """The version without the build: "0.32.0"."""
    return vllm_version().partition("+")[0]


def vllm_version() -> str:
    """The version with the build: "0.32.0+cpu". Raises ConfigurationError where there is none."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            "vLLM is not installed.", hint=f"pip install vllm=={vllm_flags.VLLM_VERSION}"
        ) from error
