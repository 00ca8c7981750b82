"""A program that starts while a child checks: real processes, a small program instead of vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import end_session, session_processes

from tensorserve.launch.handoff import receive_json
from waiting import wait_for

# Its import lasts until a file is there.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "importing").touch()
from tensorserve.engine import import_once
from tensorserve.launch.import_first import current_checker
answer = import_once._Answer(current_checker(os.environ))
while not (folder / "imported").exists():
    time.sleep(0.01)
program = answer.wait()
print(json.dumps([os.getpid(), list(program.arguments), dict(program.environment)]), flush=True)
sys.stdin.read()
"""
SERVE = """
import os, signal, sys, time
from pathlib import Path
from tensorserve import cli
from tensorserve.errors import ConfigurationError
from tensorserve.launch import handoff, serve
from tensorserve.launch.import_first import Program, import_beside

# A shell's background job, and so what it starts, is born with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])

def prepare():
    while not (folder / "importing").exists():
        time.sleep(0.01)
    exec(sys.argv[2])
    reference = handoff.publish_json({"secret": 1})
    return Program((str(folder / "program.py"), "more"), {"REFERENCE": reference})

def start(_environ, _arguments):
    program = Program((str(folder / "program.py"), str(folder)), dict(os.environ))
    import_beside(prepare, program, folder / "events.jsonl")

serve.serve = start
sys.exit(cli.main(["serve"]))
"""


def start_serve(folder: Path, act: str = "") -> subprocess.Popen[str]:
    """`tensorserve serve` with checks that do `act`, in a session of its own."""
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), act],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_program_gets_what_the_checks_ended_with(tmp_path: Path) -> None:
    """It has the process id of `serve`, and can read what the checks have published."""
    (tmp_path / "imported").touch()
    process = start_serve(tmp_path)
    try:
        assert process.stdout is not None
        pid, arguments, environment = json.loads(process.stdout.readline())
        assert pid == process.pid
        assert arguments[1:] == ["more"]
        assert receive_json(environment["REFERENCE"]) == {"secret": 1}
        process.communicate(timeout=30)
        assert process.returncode == 0
        wait_for(lambda: not session_processes(process.pid))
    finally:
        end_session(process)


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        pytest.param(
            "raise ConfigurationError('The key is wrong.')",
            78,
            "tensorserve: error: The key is wrong.",
            id="expected",
        ),
        pytest.param("1 / 0", 70, "internal error (ZeroDivisionError)", id="a bug"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", 137, "", id="killed"),
        pytest.param("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", 130, "", id="Ctrl-C"),
    ],
)
def test_a_failed_check_ends_the_import(tmp_path: Path, act: str, code: int, said: str) -> None:
    """With the check's code and message; the import would last for ever."""
    process = start_serve(tmp_path, act)
    try:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert said in errors
        assert errors.count("Traceback") == (1 if code == 70 else 0)
        wait_for(lambda: not session_processes(process.pid))
    finally:
        end_session(process)


@pytest.mark.parametrize("act", ["time.sleep(600)", ""], ids=["checking", "holding"])
def test_a_killed_program_leaves_nothing(tmp_path: Path, act: str) -> None:
    """The process that checks, or holds the memory, ends with it."""
    process = start_serve(tmp_path, act)
    try:
        wait_for(lambda: (tmp_path / "importing").exists())
        if not act:
            wait_for(lambda: any(b"held memory" in words(pid) for pid in others(process)))
        assert others(process)
        process.kill()
        wait_for(lambda: not session_processes(process.pid))
    finally:
        end_session(process)


def test_the_held_memory_outlives_signals_for_the_engine(tmp_path: Path) -> None:
    """The engine drains after SIGTERM or Ctrl-C; its workers may still read."""
    (tmp_path / "imported").touch()
    process = start_serve(tmp_path)
    try:
        wait_for(lambda: any(b"held memory" in words(pid) for pid in others(process)))
        (holder,) = others(process)
        os.kill(holder, signal.SIGTERM)
        os.kill(holder, signal.SIGINT)
        ignored = int(
            next(
                line.split()[1]
                for line in Path(f"/proc/{holder}/status").read_text().splitlines()
                if line.startswith("SigIgn:")
            ),
            16,
        )
        assert ignored >> (signal.SIGTERM - 1) & 1
        assert ignored >> (signal.SIGINT - 1) & 1
        assert others(process) == [holder]
    finally:
        end_session(process)


def others(process: subprocess.Popen[str]) -> list[int]:
    """Processes of its session but itself."""
    return [pid for pid in session_processes(process.pid) if pid != process.pid]


def words(pid: int) -> bytes:
    """Its command line; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
