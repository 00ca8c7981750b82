"""`tensorserve pack` as a program: its progress bar, and what a signal leaves behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

MIB = 1024**2
SECONDS = 60.0


def model_of(directory: Path, megabytes: int) -> Path:
    """One tensor of zeros, in a file with a hole: it takes no room on the disk."""
    directory.mkdir()
    size = megabytes * MIB
    entry = {"dtype": "U8", "shape": [megabytes, MIB], "data_offsets": [0, size]}
    header = json.dumps({"zeros": entry}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    (directory / "config.json").write_text("{}")
    return directory


def command(model: Path, destination: Path) -> list[str]:
    return [sys.executable, "-m", "tensorserve.cli", "pack", str(model), str(destination)]


def test_a_terminal_sees_a_progress_bar(tmp_path: Path) -> None:
    """In percent, on standard error; the result alone is on standard output."""
    model = model_of(tmp_path / "hf", 256)
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))  # a new one has no columns at all
    with subprocess.Popen(
        command(model, tmp_path / "bundle"), stdout=subprocess.PIPE, stderr=writer, text=True
    ) as packing:
        os.close(writer)
        seen = b""
        try:
            while data := os.read(reader, 65536):
                seen += data
        except OSError:  # how Linux says that the terminal's other side is closed
            pass
        assert packing.stdout is not None
        said = packing.stdout.read()
    os.close(reader)
    assert packing.returncode == 0, seen
    assert b"packing" in seen
    assert b"%" in seen
    assert said.startswith(str(tmp_path / "bundle"))
    assert "%" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """In the middle of a tensor: as if it had not been started."""
    model = model_of(tmp_path / "hf", 1024)
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    with subprocess.Popen(
        command(model, bundles / "m"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as packing:
        deadline, pause = time.monotonic() + SECONDS, threading.Event()
        while not list(bundles.glob(".m.packing-*/model.tensors")):
            assert packing.poll() is None
            assert time.monotonic() < deadline
            pause.wait(0.001)
        packing.send_signal(number)
        assert packing.wait(SECONDS) == code
    assert list(bundles.iterdir()) == []
