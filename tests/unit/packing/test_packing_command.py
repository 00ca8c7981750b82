"""`pack` and `verify` as programs: the progress bar, and what a signal leaves behind."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from tensorserve.packing.rank_parameters import stop, vllm_environment

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


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "tensorserve.cli", *map(str, words)]


def on_a_terminal(words: list[str]) -> tuple[int, str, bytes]:
    """(exit code, standard output, what the terminal got on standard error)."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 100))  # a new one has no columns at all
    seen = b""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=writer, text=True) as program:
        os.close(writer)
        try:
            while data := os.read(reader, 65536):
                seen += data
        except OSError:  # how Linux says that the terminal's other side is closed
            pass
        assert program.stdout is not None
        said = program.stdout.read()
    os.close(reader)
    return program.returncode, said, seen


def test_a_terminal_sees_a_progress_bar(tmp_path: Path) -> None:
    """Of pack and of verify, in percent, on standard error; results alone are on standard output,
    and damage ends verify with 65."""
    model, bundle = model_of(tmp_path / "hf", 256), tmp_path / "bundle"
    code, said, seen = on_a_terminal(command("pack", model, bundle))
    assert (code, said.startswith(str(bundle))) == (0, True), seen
    assert b"packing" in seen
    assert b"%" in seen
    assert "%" not in said
    (bundle / "config.json").write_text("{ }")
    code, said, seen = on_a_terminal(command("verify", bundle))
    assert code == 65, seen
    assert b"verifying" in seen
    assert b"%" in seen
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["ok", "model.tensors"],
        ["DAMAGED", "config.json"],
        ["ok", "model.safetensors"],
        ["unchecked", "manifest.json"],
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """In the middle of a tensor: as if it had not been started."""
    model = model_of(tmp_path / "hf", 1024)
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    with subprocess.Popen(
        command("pack", model, bundles / "m"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell ignores SIGINT in what it starts in the background, the tests themselves included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as packing:
        deadline, pause = time.monotonic() + SECONDS, threading.Event()
        while not list(bundles.glob(".m.packing-*/model.tensors")):
            assert packing.poll() is None
            assert time.monotonic() < deadline
            pause.wait(0.001)
        packing.send_signal(number)
        assert packing.stderr is not None
        assert packing.wait(SECONDS) == code, packing.stderr.read()
    assert list(bundles.iterdir()) == []


def test_vllm_gets_no_secret_while_it_builds_a_model() -> None:
    """It needs none: key and destination stay with pack. Our load format is loaded all the same."""
    shell = {
        "PATH": "/bin",
        "TENSORSERVE_KEY": "canary",
        "AWS_SECRET_ACCESS_KEY": "canary",
        "HF_TOKEN": "canary",
        "VLLM_PLUGINS": "",
    }
    seen = vllm_environment(shell)
    assert "canary" not in seen.values()
    assert seen["PATH"] == "/bin"
    assert "tensorserve" in seen["VLLM_PLUGINS"].split(",")
    assert "VLLM_PLUGINS" not in vllm_environment({}), "without a list, vLLM loads all"


def test_ranks_that_do_not_hear_are_ended_with_vllm() -> None:
    """A rank that waits for a peer which is gone: it would keep a model's memory for ever."""
    script = """
import os, signal
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
signal.pause()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    ) as vllm:
        assert vllm.stdout is not None
        rank = os.pidfd_open(int(vllm.stdout.readline()))
        stop(vllm)
        ended, _, _ = select.select([rank], [], [], SECONDS)
        os.close(rank)
    assert vllm.returncode == -signal.SIGTERM
    assert ended
