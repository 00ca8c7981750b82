"""What the parent of vLLM makes of its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from running import end_session, session_processes
from s3server import free_ports

from tensorserve.telemetry import events_path, read_state
from waiting import wait_for

# The real parent around a stand-in for vLLM: a process that ends as told.
PROGRAM = """
import os, sys
from tensorserve.launch.context import current_start, publish_start
from tensorserve.launch.engine_process import run_engine

environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": sys.argv[1]}
reference = publish_start(current_start(environ, ()))
code = int(sys.argv[2])
sys.exit(run_engine(lambda: os.kill(os.getpid(), -code) or 0 if code < 0 else code, reference))
"""


@pytest.mark.parametrize(
    ("ended", "code", "failed"),
    [
        pytest.param(3, 3, True, id="vllm's own code"),
        pytest.param(0, 1, True, id="in order, but nobody had asked: its engine had died"),
        pytest.param(-9, 137, True, id="killed"),
    ],
)
def test_the_recorded_code(tmp_path: Path, ended: int, code: int, failed: bool) -> None:
    """An end that nobody asked for is a failure, whatever vLLM's code."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(ended)],
        env=dict(os.environ),
        check=False,
    )
    assert done.returncode == code
    state = read_state(events_path(tmp_path))
    assert state.engine_exit == code
    assert (state.failure is not None) == failed


# A stand-in for vLLM whose EngineCore is killed, as by the kernel, which counts it; vLLM's server
# sees it gone and ends with its own code.
KILLED = """
import os, signal, sys
from pathlib import Path
from tensorserve import cgroup_memory
from tensorserve.launch import engine_process
from tensorserve.launch.context import current_start, publish_start

state, group, code = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": state}
reference = publish_start(current_start(environ, ()))
engine_process.memory_group = lambda: cgroup_memory.memory_group(group)

def serve():
    core = os.fork()
    if core == 0:
        signal.pause()
    os.kill(core, signal.SIGKILL)
    os.waitpid(core, 0)
    if sys.argv[4] == "by the kernel":
        (group / "memory.events").write_text("oom 1\\noom_kill 4\\n")
    return code

sys.exit(engine_process.run_engine(serve, reference))
"""


@pytest.mark.parametrize("code", [0, 1, 3])
@pytest.mark.parametrize("by", ["by the kernel", "by hand"])
def test_a_process_killed_for_memory_ends_it_with_137(tmp_path: Path, code: int, by: str) -> None:
    """Whatever vLLM says of it; with figures. A kill by hand counts nothing, and is vLLM's."""
    group = tmp_path / "group"
    group.mkdir()
    files = {"max": "8000000000", "current": "5", "peak": "7990000000", "events": "oom_kill 3\n"}
    for name, text in files.items():
        (group / f"memory.{name}").write_text(text)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(group), str(code), by]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    state = read_state(events_path(tmp_path))
    assert state.failure is not None
    if by == "by hand":
        assert done.returncode == (code or 1)
        assert state.failure.reason == "engine"
        return
    assert done.returncode == state.engine_exit == state.failure.exit_code == 137
    assert state.failure.reason == "out_of_memory"
    assert (state.failure.limit, state.failure.peak) == (8_000_000_000, 7_990_000_000)
    assert "out of memory (limit 8.00 GB, peak 7.99 GB)" in done.stderr
    assert "Traceback" not in done.stderr


# A stand-in for vLLM that serves, and finishes its requests after it was told to stop.
DRAINING = """
import os, signal, sys, time
from pathlib import Path
from tensorserve.launch.context import current_start, publish_start
from tensorserve.launch.engine_process import run_engine
from tensorserve.launch.stopping import SERVING_SECONDS
from tensorserve.telemetry import EventLog, events_path
from tensorserve.telemetry.schema import EngineReady, StartBegan

state = Path(sys.argv[1])
log = EventLog(events_path(state))
log.emit(StartBegan("a", "0", 0, "http://127.0.0.1:1/health", 1, 2))
log.emit(EngineReady("a"))
environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": str(state)}
reference = publish_start(current_start(environ, tuple(sys.argv[2:])))

def drain(*_):
    time.sleep(SERVING_SECONDS + 1)
    (state / "drained").touch()
    os._exit(0)

def serve():
    signal.signal(signal.SIGTERM, drain)
    print("serving", flush=True)
    while True:
        signal.pause()

sys.exit(run_engine(serve, reference))
"""


DRAINS = {
    (): False,
    ("--shutdown-timeout", "60"): True,
    ("--shutdown_timeout=60",): True,
}


def test_requests_drain_for_as_long_as_asked(tmp_path: Path) -> None:
    """By an argument, as by a variable; without one, vLLM is killed after its own five seconds.

    All at once: each takes those seconds.
    """
    with ExitStack() as stack:
        engines = []
        for number, words in enumerate(DRAINS):
            (tmp_path / str(number)).mkdir()
            command = [sys.executable, "-c", DRAINING, str(tmp_path / str(number)), *words]
            started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            engines.append(stack.enter_context(started))
        for engine in engines:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "serving\n"
            engine.send_signal(signal.SIGTERM)
        assert [engine.wait() for engine in engines] == [143] * len(DRAINS)
    drained = [(tmp_path / str(number) / "drained").exists() for number in range(len(DRAINS))]
    assert dict(zip(DRAINS, drained, strict=True)) == DRAINS


# What `up` is to the engine: holds the settings, and is above supervisord.
ABOVE = """
import os, signal, subprocess, sys
from tensorserve.launch.context import current_start, publish_start

environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": sys.argv[1]}
reference = publish_start(current_start(environ, ()))
engine = subprocess.Popen([sys.executable, "-c", sys.argv[2], reference])
print(engine.pid, flush=True)
signal.pause()
"""
# vLLM's server with a process of its own that outlives it.
ENGINE = """
import os, sys
from tensorserve.launch.engine_process import run_engine
command = ["sh", "-c", "sleep 1000 & echo started; exec sleep 1000"]
run_engine(lambda: os.execvp("sh", command), sys.argv[1])
"""


@pytest.mark.parametrize("victim", ["above", "engine"])
def test_kill_9_leaves_nothing_behind(tmp_path: Path, victim: str) -> None:
    """Neither of `up`, outside of a container, nor of the engine's own parent: vLLM's server goes.

    What the server had started goes with the group, where somebody is left to end it.
    """
    above = subprocess.Popen(
        [sys.executable, "-c", ABOVE, str(tmp_path), ENGINE],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert above.stdout is not None
    try:
        engine = int(above.stdout.readline())
        assert above.stdout.readline() == "started\n"
        assert len(session_processes(above.pid)) == 4
        if victim == "above":
            above.kill()
            above.wait()
            wait_for(lambda: session_processes(above.pid) == [])
        else:
            os.kill(engine, signal.SIGKILL)
            wait_for(lambda: len(session_processes(above.pid)) == 2)  # above, and an orphan of it
    finally:
        end_session(above)
        above.stdout.close()


def test_kill_9_of_up_leaves_nothing_behind(tmp_path: Path) -> None:
    """The real one, with all that it starts, waiting for a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, metrics = free_ports(2)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "TENSORSERVE_MODEL_URI": f"http://127.0.0.1:{silent.getsockname()[1]}/m",
            "TENSORSERVE_STATE_DIR": str(tmp_path / "state"),
            "TENSORSERVE_HOST": "127.0.0.1",
            "TENSORSERVE_METRICS_HOST": "127.0.0.1",
            "TENSORSERVE_PORT": str(port),
            "TENSORSERVE_METRICS_PORT": str(metrics),
        }
        with (tmp_path / "log").open("wb") as log:
            up = subprocess.Popen(
                [sys.executable, "-m", "tensorserve.cli", "up"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            silent.settimeout(30)
            silent.accept()[0].close()  # the checks have come to the source
            # up, supervisord, watch, exporter, engine, what will be vLLM, what checks beside it.
            wait_for(lambda: len(session_processes(up.pid)) >= 7, 20)
            up.kill()
            up.wait()
            wait_for(lambda: session_processes(up.pid) == [], 20)
        finally:
            end_session(up)
