"""Which GPUs will vLLM see, how much memory do they have, and which CUDA does the driver support?

From NVIDIA's management library (NVML), which makes no CUDA context. It sees all GPUs of the
container; CUDA sees those that CUDA_VISIBLE_DEVICES names, by number, by UUID (or its beginning),
or as instances of a GPU that is cut into several (MIG).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorserve.errors import ConfigurationError

# vLLM's own test (vllm/platforms/__init__.py, 0.32.0): NVML may be missing there.
_JETSON = (Path("/etc/nv_tegra_release"), Path("/sys/class/tegra-firmware"))
_TOOLKIT = (
    "Start the container with NVIDIA's container toolkit (`--gpus all`) and "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility."
)
_HINTS = {
    "NVMLError_LibraryNotFound": f"The driver's libnvidia-ml.so.1 is not here. {_TOOLKIT}",
    "NVMLError_DriverNotLoaded": "Does `nvidia-smi` work on the host? Load or install the driver "
    "there, then start the container again.",
    "NVMLError_LibRmVersionMismatch": "The host's driver was updated while an older one is loaded. "
    "Restart the host (or reload its nvidia modules), then start the container again.",
    "NVMLError_NoPermission": f"May this user open /dev/nvidiactl and /dev/nvidia*? {_TOOLKIT}",
}


@dataclass(frozen=True)
class Gpu:
    """One device as CUDA would number it. Memory in bytes; None where NVML does not tell."""

    name: str
    total: int | None = None
    free: int | None = None
    unified: bool = False
    """Whether its memory is the host's."""
    major: int | None = None
    """Of its compute capability: 10 for 10.0 and 10.3."""
    trouble: str | None = None
    """Why the memory is not known, in NVML's words."""


@dataclass(frozen=True)
class Gpus:
    """What a process that starts now would find."""

    visible: tuple[Gpu, ...]
    present: int
    """How many NVML sees, whatever CUDA_VISIBLE_DEVICES says."""
    driver: str | None = None
    """"580.65.06"."""
    cuda: int | None = None
    """The newest CUDA that the driver carries: 13000 for 13.0."""


def read_gpus(visible: str | None) -> Gpus | None:
    """The GPUs that `visible` (CUDA_VISIBLE_DEVICES) leaves; None where nothing can be known.

    What NVML does not tell of one GPU stays open. Raises ConfigurationError where NVML itself
    cannot be used, which ends vLLM later, and for an entry of `visible` that names no GPU.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        with _session(pynvml):
            driver = _answer(pynvml, pynvml.nvmlSystemGetDriverVersion)
            cuda = _answer(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
            count = int(pynvml.nvmlDeviceGetCount())
            found = tuple(_visible(pynvml, visible, count))
            return Gpus(found, count, _text(driver), cuda)
    except pynvml.NVMLError as error:
        if any(path.exists() for path in _JETSON):
            return None
        raise ConfigurationError(
            f"NVIDIA's management library (NVML) cannot be used: {error}.",
            hint=_HINTS.get(type(error).__name__, "Does `nvidia-smi` work here, and on the host?"),
        ) from error


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        _answer(nvml, nvml.nvmlShutdown)


def _visible(nvml: Any, visible: str | None, count: int) -> Iterator[Gpu]:
    if visible is None:
        for number in range(count):
            yield _numbered(nvml, number)
        return
    for entry in (part.strip() for part in visible.split(",") if part.strip()):
        if entry.isdecimal() and len(entry) < 10 and int(entry) < count:
            yield _numbered(nvml, int(entry))
        elif entry.startswith("MIG-"):
            yield _instance(nvml, entry)
        elif (named := _by_uuid(nvml, entry, count)) is not None:
            yield _numbered(nvml, named)
        elif entry.startswith("-") and entry[1:].isdecimal():
            return  # CUDA passes over this one and all that follow
        else:
            raise ConfigurationError(
                f"CUDA_VISIBLE_DEVICES names {entry!r}; {_count(count)} visible in this container.",
                hint="Take a number from 0, or a UUID as `nvidia-smi -L` shows it.",
            )


def _by_uuid(nvml: Any, wanted: str, count: int) -> int | None:
    """CUDA takes the beginning of a UUID where only one GPU's begins so."""
    if not wanted.startswith("GPU-"):
        return None
    named = []
    for number in range(count):
        handle = _answer(nvml, nvml.nvmlDeviceGetHandleByIndex, number)
        uuid = None if handle is None else _answer(nvml, nvml.nvmlDeviceGetUUID, handle)
        if (_text(uuid) or "").startswith(wanted):
            named.append(number)
    return named[0] if len(named) == 1 else None


def _numbered(nvml: Any, number: int) -> Gpu:
    """A GPU; where it is cut into instances, the first: CUDA shows a process only one instance."""
    where = f"GPU {number}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
    except nvml.NVMLError as error:
        return Gpu(where, trouble=str(error))
    mode = _answer(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if not mode or not mode[0]:
        return _measured(nvml, where, handle)
    for place in range(_answer(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        instance = _answer(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
        if instance is not None:
            return _measured(nvml, f"{where}, MIG instance {place}", instance)
    return Gpu(where, trouble="it is cut into MIG instances, and none can be seen")


def _instance(nvml: Any, uuid: str) -> Gpu:
    # Not every container may ask for it, and drivers before R470 name it otherwise.
    handle = _answer(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)
    if handle is None:
        return Gpu(uuid, trouble="NVML does not know this MIG instance here")
    return _measured(nvml, uuid, handle)


def _measured(nvml: Any, where: str, handle: Any) -> Gpu:
    name = _text(_answer(nvml, nvml.nvmlDeviceGetName, handle))
    name = f"{where} ({name})" if name else where
    capability = _answer(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    major = capability[0] if capability else None
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        # GB10 and other GPUs that share the host's memory have none of their own to tell of.
        unified = type(error).__name__ == "NVMLError_NotSupported"
        return Gpu(name, unified=unified, trouble=str(error), major=major)
    return Gpu(name, int(memory.total), int(memory.free), major=major)


def _answer(nvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any | None:
    """What NVML says, None where it refuses to say."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None


def _text(answer: Any) -> str | None:
    return answer.decode() if isinstance(answer, bytes) else answer


def _count(count: int) -> str:
    return "1 GPU is" if count == 1 else f"{count} GPUs are"
