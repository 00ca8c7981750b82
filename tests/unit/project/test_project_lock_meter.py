"""The meter of the interpreter's lock (bench/lock_meter.c) counts who has it and runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench.directories import ROOT
from bench.lock_worker import LockMeter, compiled

WORK = 0.1  # CPU seconds


def loop() -> None:
    """Python that never waits."""
    until = time.thread_time() + WORK
    while time.thread_time() < until:
        pass


def in_c() -> None:
    """A call of C that lets go of the lock."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)


def shares() -> None:
    """Print, of each piece of work, the part of its processor time with the lock."""
    meter = LockMeter()
    found = {}
    for name, work, threads in (
        *(("loop", loop, 1), ("loops", loop, 3)),
        *(("in_c", in_c, 1), ("several_in_c", in_c, 3)),
    ):
        cpu, before = time.process_time(), meter.read()
        _side_by_side(work, threads)
        held = meter.read() - before
        found[name] = held.running / (time.process_time() - cpu)
    print(json.dumps(found))


def _side_by_side(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def busy_processors() -> Iterator[None]:
    """Two neighbours for each processor, which never sleep."""
    count = 2 * len(os.sched_getaffinity(0))
    spinning = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spinning) for _ in range(count)]
    yield
    for neighbour in neighbours:
        neighbour.kill()
        neighbour.wait()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="CPython 3.11's lock")
@pytest.mark.usefixtures("busy_processors")
def test_waiting_for_a_processor_does_not_count(tmp_path: Path) -> None:
    """A loop in Python has the lock all of its time, C that lets go of it next to never."""
    environment = dict(os.environ) | compiled(tmp_path) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout)
    assert 0.8 < found["loop"] < 1.01
    assert 0.8 < found["loops"] < 1.01
    assert found["in_c"] < 0.3
    assert found["several_in_c"] < 0.3


if __name__ == "__main__":
    shares()
