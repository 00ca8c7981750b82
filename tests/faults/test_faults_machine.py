"""F10 and F11: disks and memory that are too small, made for real where the machine allows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import command
from proxy import FaultProxy
from safetensors.torch import save_file
from stored import BUCKET, KEY, Stored, tensors

from tensorserve.bundle.download import fetch_artifacts
from tensorserve.errors import ConfigurationError
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access

Mounted = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    """Makes a tmpfs of a size, like `mounted("1m")` or `mounted("1m", "ro")`; gives its path."""
    made: list[Path] = []

    def mount(size: str, *options: str) -> Path:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs"]
        if shutil.which("mount") is None or os.getuid() != 0:
            pytest.skip("needs root and mount to make a small disk")
        if subprocess.run([*words, str(path)], capture_output=True, check=False).returncode:
            pytest.skip("this container may not mount a tmpfs")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> None:
    """Somebody else takes all that is left."""
    with (disk / "other").open("wb", buffering=0) as file:
        # A write that finds no room for all of it writes what fits.
        while file.write(bytes(1024**2)) == 1024**2:
            pass
    assert shutil.disk_usage(disk).free == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """26 MiB to pack."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(tensors(1), directory / "model.safetensors", {"format": "pt"})
    return directory


# F10 ----------------------------------------------------------------------------------------------


def test_f10_a_full_state_directory_is_found_before_the_start(
    stored: Stored, mounted: Mounted
) -> None:
    """F10: exit code 78 with the path and both figures; the source is not even asked."""
    disk = mounted("1m")
    with FaultProxy(stored.s3.endpoint_url) as proxy:
        code, text = command(stored, proxy, "check", TENSORSERVE_STATE_DIR=f"{disk}/state")
    assert code == 78, text
    assert f"{disk}/state has 1 MiB free, 64 MiB are needed" in text
    assert not proxy.requests


def test_f10_a_read_only_state_directory_is_found_first(stored: Stored, mounted: Mounted) -> None:
    """F10: exit code 78 with the path and the reason."""
    disk = mounted("100m", "ro")
    code, text = command(stored, None, "check", TENSORSERVE_STATE_DIR=f"{disk}/state")
    assert code == 78, text
    assert f"{disk}/state cannot be written: Read-only file system" in text


def refused_pack(model: Path, place: Path, **options: object) -> str:
    """What is said, with exit code 78, when a bundle cannot be packed there."""
    with pytest.raises(ConfigurationError) as caught:
        pack(model, str(place), access=Access(), key=Secret(KEY), **options)
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_f10_packing_to_too_small_a_disk_is_refused_at_once(model: Path, mounted: Mounted) -> None:
    """F10: both figures, and nothing is written."""
    disk = mounted("1m")
    assert f"{disk} has 1048576 bytes free, the bundle needs" in refused_pack(model, disk / "b")
    assert list(disk.iterdir()) == []


def test_f10_packing_to_a_read_only_disk_is_refused(model: Path, mounted: Mounted) -> None:
    """F10: the path and the reason."""
    disk = mounted("100m", "ro")
    text = refused_pack(model, disk / "b")
    assert f"{disk}/b could not be written: Read-only file system" in text


def test_f10_a_disk_that_fills_up_while_packing_is_cleaned(model: Path, mounted: Mounted) -> None:
    """F10: there was room when it was checked; what was written is removed. The weights' room is
    set aside before they are written, so it is the next file that finds none."""
    disk = mounted("64m")
    filled: list[int] = []

    def meanwhile(done: int, _size: int) -> None:
        if not filled:
            filled.append(done)
            fill(disk)

    text = refused_pack(model, disk / "b", progress=meanwhile)
    assert f"{disk}/b/config.json could not be written: No space left on device" in text
    assert filled
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_f10_small_files_that_do_not_fit_are_not_fetched(
    stored: Stored, proxy: FaultProxy, mounted: Mounted
) -> None:
    """F10: configuration and tokenizer go to the state directory; the bundle's listing says how
    large they are."""
    disk = mounted("1m")
    put(stored, "f10-large", {"config.json": b"{}", "tokenizer.json": bytes(2 * 1024**2)})
    with pytest.raises(ConfigurationError, match="bytes free, the bundle's small files need 2097"):
        fetch_artifacts(f"s3://{BUCKET}/f10-large", stored.access(proxy.url), disk / "model")
    assert not [r for r in proxy.requests if r.path.endswith("tokenizer.json")]


def test_f10_a_disk_that_fills_up_while_small_files_are_fetched(
    stored: Stored, proxy: FaultProxy, mounted: Mounted
) -> None:
    """F10: exit code 78 with the file's path; a file is complete or absent."""
    disk = mounted("4m")
    put(stored, "f10-filled", {"config.json": b"{}", "tokenizer.json": bytes(2 * 1024**2)})
    proxy.add("none", path="tokenizer.json", beyond=0, hook=lambda _: fill(disk))
    with pytest.raises(ConfigurationError, match="No space left on device") as caught:
        fetch_artifacts(f"s3://{BUCKET}/f10-filled", stored.access(proxy.url), disk / "model")
    assert caught.value.exit_code == 78
    # Of the two, fetched together, config.json may have been written before.
    assert re.search(rf"{disk}/model/(config|tokenizer)\.json could not be", str(caught.value))
    assert proxy.fired == {"none": 1}
    left = {file.name: file.read_bytes() for file in (disk / "model").iterdir()}
    assert left in ({}, {"config.json": b"{}"})


def put(stored: Stored, prefix: str, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        stored.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=body)


# F11 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["machine", "control group"])
def test_f11_weights_beyond_host_memory_are_refused_first(
    stored: Stored, tmp_path: Path, limit: str
) -> None:
    """F11: exit code 78 with both figures. What the kernel says is replaced, for this command
    alone: 20 MB for weights of 28 MB."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to show another /proc/meminfo")
    said = tmp_path / "said"
    said.mkdir()
    (said / "meminfo").write_text("MemTotal: 100000 kB\nMemAvailable: 19532 kB\n")
    (said / "memory.max").write_text("60000000\n")
    (said / "memory.current").write_text("40000000\n")
    there = {
        "machine": f"mount --bind {said}/meminfo /proc/meminfo",
        "control group": f"mount --bind {said} /sys/fs/cgroup",
    }[limit]
    code, text = command(
        stored,
        None,
        "check",
        wrap=("unshare", "--mount", "sh", "-c", f'{there} && exec "$@"', "sh"),
        TENSORSERVE_STATE_DIR=str(tmp_path / "state"),
    )
    assert code == 78, text
    assert "The weights are 0.03 GB, host memory has 0.02 GB" in text
