"""What NVML tells of the GPUs, and every way in which it refuses to.

The library's own Python module, as vLLM brings it, with its own errors; below it stands no driver,
so its functions are replaced.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tensorserve.config.ranks import Ranks
from tensorserve.errors import ConfigurationError
from tensorserve.launch import gpus
from tensorserve.launch.gpus import Gpu, read_gpus
from tensorserve.launch.preflight import check_device, check_memory, memory, vllm_build

GB = 10**9


@dataclass
class Card:
    """A GPU of the fake driver; `memory` an error's name where NVML refuses."""

    uuid: str = "GPU-00000000-1111"
    memory: tuple[int, int] | str = (80 * GB, 79 * GB)
    instances: tuple[Card, ...] = ()
    name: str = "NVIDIA H100"
    capability: tuple[int, int] | None = (9, 0)


class Driver:
    """What stands below NVML's Python module."""

    def __init__(self, nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cards: tuple[Card, ...] = ()
        self.cuda: int | str = 13000
        self.start: str | None = None
        self._nvml = nvml
        self._open = 0
        for name in (
            *("nvmlInit", "nvmlShutdown", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"),
            *("nvmlSystemGetCudaDriverVersion_v2", "nvmlDeviceGetHandleByIndex"),
            *("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUUID", "nvmlDeviceGetName"),
            *("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount"),
            *("nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetCudaComputeCapability"),
        ):
            assert hasattr(nvml, name)
            monkeypatch.setattr(nvml, name, getattr(self, name))

    def refuse(self, name: str) -> Exception:
        error: Exception = getattr(self._nvml, f"NVMLError_{name}")()
        return error

    def nvmlInit(self) -> None:
        if self.start:
            raise self.refuse(self.start)
        self._open += 1

    def nvmlShutdown(self) -> None:
        self._open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        if isinstance(self.cuda, str):
            raise self.refuse(self.cuda)
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        assert self._open == 1
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> Card:
        return self.cards[number]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        for card in self.cards:
            for one in (card, *card.instances):
                if one.uuid == uuid:
                    return one
        raise self.refuse("NotFound")

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> bytes:
        return card.name.encode()

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> tuple[int, int]:
        if card.capability is None:
            raise self.refuse("NotSupported")
        return card.capability

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> SimpleNamespace:
        if isinstance(card.memory, str):
            raise self.refuse(card.memory)
        return SimpleNamespace(total=card.memory[0], free=card.memory[1])

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if not card.instances:
            raise self.refuse("NotSupported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7 if card.instances else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, number: int) -> Card:
        # The first places may be another container's.
        if number < 2 or number - 2 >= len(card.instances):
            raise self.refuse("NotFound")
        return card.instances[number - 2]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver without GPUs, below the real module."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM brings the module")
    path = Path(spec.origin).parent / "third_party" / "pynvml.py"
    own = importlib.util.spec_from_file_location("pynvml", path)
    assert own is not None
    assert own.loader is not None
    nvml = importlib.util.module_from_spec(own)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    own.loader.exec_module(nvml)
    monkeypatch.setattr(vllm_build, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(gpus, "_JETSON", ())
    return Driver(nvml, monkeypatch)


def found(visible: str | None = None) -> tuple[Gpu, ...]:
    read = read_gpus(visible)
    assert read is not None
    return read.visible


def test_without_a_wish_all_gpus_are_visible(driver: Driver) -> None:
    driver.cards = (Card(), Card("GPU-2", (40 * GB, 10 * GB)))
    assert [(gpu.total, gpu.free) for gpu in found()] == [(80 * GB, 79 * GB), (40 * GB, 10 * GB)]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["b"]),
        ("1,0", ["b", "a"]),
        (" 1 , 2", ["b", "c"]),
        ("GPU-bb", ["b"]),
        ("GPU-bb-2222,GPU-cc", ["b", "c"]),
        ("0,-1,1", ["a"]),
        ("", []),
        ("-1", []),
    ],
)
def test_cudas_own_list_is_read_as_cuda_reads_it(
    driver: Driver, visible: str, names: list[str]
) -> None:
    """Numbers, UUIDs and their beginnings; an entry below zero ends the list."""
    driver.cards = (
        Card("GPU-aa-1111", name="a"),
        Card("GPU-bb-2222", name="b"),
        Card("GPU-cc-3333", name="c"),
    )
    assert [gpu.name.split("(")[1].rstrip(")") for gpu in found(visible)] == names


@pytest.mark.parametrize("visible", ["7", "GPU-ff", "GPU-", "all", "cuda:0"])
def test_an_entry_that_names_no_gpu_is_said(driver: Driver, visible: str) -> None:
    """CUDA would end its list there, in silence. "GPU-" could be either of the two."""
    driver.cards = (Card("GPU-aa"), Card("GPU-bb"))
    with pytest.raises(ConfigurationError, match="2 GPUs are visible"):
        found(visible)


def test_an_instance_of_a_gpu_has_its_own_memory(driver: Driver) -> None:
    """By its UUID; and the first of them where nobody chose."""
    instance = Card("MIG-1", (10 * GB, 9 * GB))
    driver.cards = (Card(memory="NoPermission", instances=(instance,)),)
    assert [gpu.total for gpu in found("MIG-1")] == [10 * GB]
    assert [gpu.total for gpu in found()] == [10 * GB]


def test_an_instance_unknown_to_nvml_leaves_the_memory_open(driver: Driver) -> None:
    """Older names (MIG-GPU-…/1/0), and containers that may not ask."""
    driver.cards = (Card(instances=(Card("MIG-1"),)),)
    (gpu,) = found("MIG-GPU-5c89852c/1/0")
    assert gpu.total is None
    assert "not known" in check_memory(GB, Ranks(), read_gpus("MIG-x")).found


@pytest.mark.parametrize(
    "error",
    ["LibraryNotFound", "DriverNotLoaded", "LibRmVersionMismatch", "NoPermission", "Unknown"],
)
def test_a_library_that_cannot_be_used_is_a_message(driver: Driver, error: str) -> None:
    """vLLM, too, finds no GPU then, a minute later and in other words."""
    driver.start = error
    with pytest.raises(ConfigurationError, match="NVML") as raised:
        read_gpus(None)
    assert raised.value.exit_code == 78
    assert raised.value.hint


def test_a_jetson_has_no_such_library(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM serves there all the same."""
    driver.start = "LibraryNotFound"
    monkeypatch.setattr(gpus, "_JETSON", (tmp_path,))
    assert read_gpus(None) is None
    assert "not known" in check_memory(GB, Ranks(), None).found
    assert "GPU" in check_device(None, Ranks()).found


@pytest.mark.parametrize("error", ["NoPermission", "GpuIsLost", "Unknown"])
def test_a_gpu_that_tells_nothing_does_not_end_the_start(driver: Driver, error: str) -> None:
    """What is not known is no reason to refuse."""
    driver.cards = (Card(memory=error),)
    said = check_memory(900 * GB, Ranks(), read_gpus(None)).found
    assert "not known" in said
    assert found()[0].trouble is not None
    assert found()[0].trouble in said


def test_a_gpu_without_memory_of_its_own_has_the_hosts(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GB10: NVML says "Not Supported"."""
    driver.cards = (Card(memory="NotSupported", name="NVIDIA GB10"),)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100 * GB)
    assert "1.00 GB of 100.00 GB" in check_memory(GB, Ranks(), read_gpus(None)).found
    with pytest.raises(ConfigurationError, match=r"200\.00 GB, host memory has 100\.00 GB"):
        check_memory(200 * GB, Ranks(), read_gpus(None))


def test_the_gpus_that_are_used_count_not_all_of_the_host(driver: Driver) -> None:
    """One rank on a host of eight has one GPU's memory."""
    driver.cards = tuple(Card(f"GPU-{n}") for n in range(8))
    with pytest.raises(ConfigurationError, match=r"100\.00 GB, GPU 0 \(NVIDIA H100\) has 80\.00"):
        check_memory(100 * GB, Ranks(), read_gpus(None))
    said = check_memory(100 * GB, Ranks(2, 2), read_gpus(None)).found
    assert said.startswith("50.00 GB for each rank")


def test_memory_that_others_hold_is_not_there(driver: Driver) -> None:
    """Both figures, and where to look; of the second GPU, which is the one that is used."""
    driver.cards = (Card("GPU-a"), Card("GPU-b", (80 * GB, 20 * GB)))
    with pytest.raises(ConfigurationError, match=r"GPU 1 .* 20\.00 GB free of 80\.00 GB"):
        check_memory(40 * GB, Ranks(), read_gpus("1"))
    assert "79.00 GB free" in check_memory(40 * GB, Ranks(), read_gpus("0")).found


def test_what_vllm_makes_smaller_is_not_refused(driver: Driver) -> None:
    """Online quantization, or weights that stay in host memory."""
    driver.cards = (Card(),)
    check_memory(100 * GB, Ranks(), read_gpus(None), whole=False)


@pytest.mark.parametrize(
    ("version", "cuda", "message"),
    [
        ("0.32.0", 12080, r"580\.65\.06 carries CUDA 12\.8; .* needs CUDA 13"),
        ("0.32.0+cu129", 11040, r"carries CUDA 11\.4; .* needs CUDA 12"),
    ],
)
def test_a_driver_that_is_too_old_is_refused(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, version: str, cuda: int, message: str
) -> None:
    """With what is there, what is needed, and which driver has it."""
    driver.cards, driver.cuda = (Card(),), cuda
    monkeypatch.setattr(vllm_build, "vllm_version", lambda: version)
    with pytest.raises(ConfigurationError, match=message) as raised:
        check_device(read_gpus(None), Ranks())
    assert "R5" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("version", "cuda"), [("0.32.0", 13000), ("0.32.0", 13020), ("0.32.0+cu129", 12020)]
)
def test_a_driver_that_is_new_enough_is_named(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, version: str, cuda: int
) -> None:
    driver.cards, driver.cuda = (Card(),), cuda
    monkeypatch.setattr(vllm_build, "vllm_version", lambda: version)
    said = check_device(read_gpus(None), Ranks()).found
    assert said == "1 of 1 GPUs, GPU 0 (NVIDIA H100), driver 580.65.06"


def test_a_driver_that_does_not_tell_is_not_refused(driver: Driver) -> None:
    driver.cards, driver.cuda = (Card(),), "FunctionNotFound"
    check_device(read_gpus(None), Ranks())


def test_fewer_gpus_than_ranks_are_said(driver: Driver) -> None:
    """Also that CUDA_VISIBLE_DEVICES hides some."""
    driver.cards = tuple(Card(f"GPU-{n}") for n in range(4))
    with pytest.raises(ConfigurationError, match=r"8 ranks .* 4 GPUs are visible\."):
        check_device(read_gpus(None), Ranks(8, 8))
    with pytest.raises(ConfigurationError, match=r"1 GPU is visible \(4 without CUDA_VISIBLE"):
        check_device(read_gpus("2"), Ranks(2, 2))
    with pytest.raises(ConfigurationError, match=r"1 rank is .* 0 GPUs are visible"):
        check_device(read_gpus(""), Ranks())
    check_device(read_gpus("2"), Ranks(8, None))


def test_what_is_asked_of_nvml_is_there_in_the_real_module(driver: Driver) -> None:
    """The fixture refuses names that the module lacks; here the errors' names."""
    nvml: Any = sys.modules["pynvml"]
    for name in gpus._HINTS:
        assert issubclass(getattr(nvml, name), nvml.NVMLError)
    refused: Callable[[str], Exception] = driver.refuse
    assert type(refused("NotSupported")).__name__ == "NVMLError_NotSupported"
