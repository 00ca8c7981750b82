"""The scan for weights in what an engine wrote: what it finds, and what it says it does not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.errors import ConfigurationError
from tensorserve.packing import weight_scan
from tensorserve.packing.pack import pack
from tensorserve.packing.weight_scan import WeightScan, scan_for
from tensorserve.secret import Secret
from tensorserve.sources import Access

WEIGHTS = os.urandom(100_000)
KEY = bytes(range(32))


def scan(*tensors: bytes) -> WeightScan:
    made = WeightScan(sum(map(len, tensors)))
    for tensor in tensors:
        made.add(tensor)
    return made


def finds(made: WeightScan, directory: Path, data: bytes, name: str = "file.bin") -> bool:
    (directory / name).write_bytes(data)
    try:
        made.refuse(directory, [name])
    except ConfigurationError as error:
        return name in error.message
    return False


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 4095, 4 * 1024**2 - 17])
def test_consecutive_bytes_are_found_at_any_offset(offset: int, tmp_path: Path) -> None:
    """Also across the scan's own blocks; at least 4 KiB and a window of them, from anywhere."""
    piece = WEIGHTS[12_345 : 12_345 + 4096 + 32]
    made = scan(WEIGHTS)
    assert finds(made, tmp_path, os.urandom(offset) + piece + os.urandom(99))
    assert finds(made, tmp_path, os.urandom(offset) + WEIGHTS)


def test_other_data_are_not_found(tmp_path: Path) -> None:
    """Random data, code, zeros, nothing."""
    made = scan(WEIGHTS)
    for data in (os.urandom(5_000_000), b"def f(): ...\n" * 9999, bytes(100_000), b"", b"abc"):
        assert not finds(made, tmp_path, data)


def test_constant_tensors_say_nothing(tmp_path: Path) -> None:
    """A norm of ones in bfloat16, and zeros: other files have them too."""
    ones = b"\x80\x3f" * 5000
    assert not finds(scan(ones, bytes(9000)), tmp_path, ones + bytes(9000))
    assert not finds(scan(), tmp_path, WEIGHTS)


def test_another_form_is_not_found(tmp_path: Path) -> None:
    """As the module says: converted weights have other bytes."""
    tensor = np.random.default_rng(0).standard_normal(50_000, np.float32)
    assert finds(scan(tensor.tobytes()), tmp_path, tensor.tobytes())
    assert not finds(scan(tensor.tobytes()), tmp_path, tensor.astype(np.float64).tobytes())


@pytest.mark.parametrize("name", ["a.safetensors", "b.tensors", "c.gguf"])
def test_files_of_weights_are_refused_by_their_name(name: str, tmp_path: Path) -> None:
    assert finds(scan(WEIGHTS), tmp_path, b"", name)


def test_small_and_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of windows is bounded; tensors below a window are passed over."""
    assert WeightScan(10**6).distance == 4096
    assert WeightScan(4 * 1024**3).distance == 4096
    assert WeightScan(400 * 10**9).distance == pytest.approx(400 * 10**9 / 2**20, abs=32)
    monkeypatch.setattr(weight_scan, "_MOST_WINDOWS", 10)
    scan(b"", WEIGHTS[:31])


def test_windows_are_of_a_bundles_plaintext(tmp_path: Path) -> None:
    """Sealed tensors are opened; the rest of the file is not looked for."""
    model = tmp_path / "hf"
    model.mkdir()
    tensor = torch.randn(300, 100)
    save_file({"w": tensor, "tiny": torch.ones(2)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    pack(model, str(tmp_path / "bundle"), access=Access(), key=Secret(KEY, "the test"))
    key = GivenKey(KEY, "the test")
    opened = open_tensors(str(tmp_path / "bundle/model.tensors"), Access(), key)
    try:
        made = scan_for([opened])
    finally:
        opened.source.close()
    assert finds(made, tmp_path, tensor.numpy().tobytes())
    assert not finds(made, tmp_path, (tmp_path / "bundle/model.tensors").read_bytes())
