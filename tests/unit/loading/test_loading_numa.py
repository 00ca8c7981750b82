"""Which processors are near a GPU, as the kernel shows it in /sys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tensorserve.loading.numa import near

GPU = torch.device("cuda", 1)
ALLOWED = range(8)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU at 0000:dc:00.0, on a node with processors 4 to 7 and 12."""
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    place = tmp_path / "0000:dc:00.0"
    place.mkdir()
    (place / "numa_node").write_text("1\n")
    (place / "local_cpulist").write_text("4-7,12\n")
    return tmp_path


def test_the_node_of_the_gpu_and_what_is_allowed(devices: Path) -> None:
    """No processor that the container must not use."""
    assert near(GPU, ALLOWED, devices) == {4, 5, 6, 7}
    assert near(GPU, {1, 5, 12}, devices) == {5, 12}


def test_who_is_bound_to_another_node_stays_there(devices: Path) -> None:
    """Kubernetes' CPU manager, or a user."""
    assert near(GPU, {0, 1}, devices) == {0, 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("numa_node", "-1\n"),
        ("numa_node", "what\n"),
        ("local_cpulist", "\n"),
        ("local_cpulist", "f-7\n"),
    ],
)
def test_what_the_kernel_does_not_know_binds_nobody(devices: Path, name: str, text: str) -> None:
    """One node, or a virtual machine: all processors are then as near."""
    (devices / "0000:dc:00.0" / name).write_text(text)
    assert near(GPU, ALLOWED, devices) == set(ALLOWED)


def test_where_the_kernel_shows_no_such_device(devices: Path) -> None:
    """A sandbox."""
    assert near(GPU, ALLOWED, devices / "none") == set(ALLOWED)


@pytest.mark.parametrize("error", [AssertionError, RuntimeError, AttributeError])
def test_where_cuda_does_not_say_where_its_device_is(
    devices: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older torch, no driver, no such device."""

    def refuse(_: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    assert near(GPU, ALLOWED, devices) == set(ALLOWED)


def test_on_a_cpu_nothing_is_asked(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no device to be near to."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: pytest.fail("asked"))
    assert near(torch.device("cpu"), ALLOWED, devices) == set(ALLOWED)
