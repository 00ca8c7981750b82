"""`make demo` does what the README says, and Ctrl-C stops all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from running import session_processes

from waiting import wait_for

DEMO = Path(__file__).parents[2] / "demo" / "demo.py"
CACHE = os.fsencode(DEMO.parents[1] / ".cache" / "demo")


def start(log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-u", str(DEMO)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # A shell's background job, and so what it starts, is born with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def children_of_demo() -> set[int]:
    """Servers and engines that a demo leaves running, found by what they are."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if CACHE in words or b"tensorserve-demo-" in words:
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that fails must not leave what makes the next one fail."""
    yield
    for pid in children_of_demo():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_the_demo_answers_and_leaves_nothing_running(tmp_path: Path) -> None:
    """A question over the API, the report, exit code 0."""
    log = tmp_path / "demo.log"
    demo = start(log)
    code = demo.wait(300)
    text = log.read_text()
    assert code == 0, text
    assert "Paris" in text
    assert "postprocess" in text.partition("Where the time of the start went")[2]
    assert session_processes(demo.pid) == []
    assert children_of_demo() == set()


@pytest.mark.parametrize("moment", ["real S3 server", "import", "Packed and encrypted"])
def test_ctrl_c_stops_everything(tmp_path: Path, moment: str) -> None:
    """At whatever step: exit code 130, and nothing is left."""
    log = tmp_path / "demo.log"
    demo = start(log)
    wait_for_text(log, demo, {"real S3 server": "──"}.get(moment, moment))
    # A terminal sends Ctrl-C to the whole foreground group.
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(30) == 130, log.read_text()
    assert session_processes(demo.pid) == []
    assert children_of_demo() == set()


def test_a_closed_terminal_stops_everything(tmp_path: Path) -> None:
    """Its hang-up reaches `make` alone: the demo must notice that its parent is gone."""
    log = tmp_path / "demo.log"
    with log.open("wb") as output:
        make = subprocess.Popen(
            ["sh", "-c", '"$0" -u "$1" & wait', sys.executable, str(DEMO)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    wait_for_text(log, make, "import")
    assert children_of_demo() != set()
    make.kill()  # where SIGHUP is ignored (nohup), it would live on
    make.wait(10)
    wait_for(
        lambda: not (session_processes(make.pid) or children_of_demo()),
        30,
        every=0.1,
        said=log.read_text,
    )


def wait_for_text(log: Path, demo: subprocess.Popen[bytes], text: str) -> None:
    def printed() -> bool:
        assert demo.poll() is None, log.read_text()
        return text in log.read_text()

    wait_for(printed, 120, every=0.02, said=log.read_text)
