"""F18: a start whose engine does not end by itself. vLLM is a stand-in; `up` and all else is real.

The same with vLLM itself: e2e/test_lost_worker.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import PROGRAM
from running import end_session, session_processes
from s3server import free_ports
from safetensors.torch import save_file

from tensorserve.packing.pack import pack
from tensorserve.sources import Access
from tensorserve.telemetry import events_path, read_state
from waiting import wait_for

# The real parent of vLLM around a stand-in for it, which waits for ever: its server, and a worker
# that has loaded and then comes to grief as told.
WAITING = """
import os, signal, socket, sys, time
from pathlib import Path
from tensorserve import cgroup_memory
from tensorserve.launch import engine_process, start_watch
from tensorserve.launch.context import current_start, publish_start
from tensorserve.telemetry import EventLog, events_path
from tensorserve.telemetry.schema import (
    LoadDone, LoadPlanned, StartBegan, StartFailed, WorkerFailed,
)

state, how = Path(sys.argv[1]), sys.argv[2]
start_watch.GRACE_SECONDS = 1.0
group = state / "group"
engine_process.memory_group = lambda: cgroup_memory.memory_group(group)
log = EventLog(events_path(state))
listening = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{listening.getsockname()[1]}/health"
log.emit(StartBegan("a", "0", 0, url, 1, 2))
environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": str(state)}
environ |= {"TENSORSERVE_FETCH_DEADLINE": "1", "TENSORSERVE_START_DEADLINE": "10"}
reference = publish_start(current_start(environ, ()))

def serve():
    if os.fork() == 0:
        log.emit(LoadPlanned(0, 10, 1, "auto"))
        log.emit(LoadDone(0))
        time.sleep(1)
        if how == "raised":
            log.emit(WorkerFailed(0, "RuntimeError: made to fail"))
        elif how == "failed":
            log.emit(StartFailed("corrupt", 65, "made to fail"))
        elif how != "serves":
            if how == "killed for memory":
                (group / "memory.events").write_text("oom_kill 4\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            signal.pause()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "serves":
        asked, _ = listening.accept()
        asked.recv(1000)
        asked.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
        asked.close()
        time.sleep(5)  # longer than an engine has that is told to stop
        return 3
    while how != "ends by itself":
        signal.pause()
    os.wait()
    return 3

sys.exit(engine_process.run_engine(serve, reference))
"""


@pytest.mark.parametrize(
    ("how", "code", "reason", "said"),
    [
        ("died", 70, "worker_lost", "the worker of rank 0 ended."),
        ("raised", 70, "worker_lost", "rank 0 raised RuntimeError: made to fail."),
        ("killed for memory", 137, "out_of_memory", "out of memory"),
        ("failed", 65, "corrupt", "made to fail"),
        ("ends by itself", 3, "engine", "ended by itself with code 3"),
        # Nobody wrote that it is ready, as where the state directory is full.
        ("serves", 3, "engine", "ended by itself with code 3"),
    ],
)
def test_f18_a_lost_worker_ends_a_start_that_waits(
    tmp_path: Path, how: str, code: int, reason: str, said: str
) -> None:
    """F18: with the reason and its code; nothing is left, and vLLM's own end comes first. An engine
    that serves is left alone."""
    group = tmp_path / "group"
    group.mkdir()
    for name, text in {"max": "8000000000", "current": "5", "events": "oom_kill 3\n"}.items():
        (group / f"memory.{name}").write_text(text)
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path), how],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as engine:
        assert engine.stderr is not None
        text = engine.stderr.read()  # all who could write have ended
        assert engine.wait() == code
    assert "Traceback" not in text
    state = read_state(events_path(tmp_path))
    assert state.engine_exit == code
    assert state.failure is not None
    assert (state.failure.reason, state.failure.exit_code) == (reason, code)
    assert said in state.failure.message
    assert ("tensorserve: error:" in text) == (reason not in {"corrupt", "engine"})
    assert session_processes(engine.pid) == []


# Python runs it before vLLM's program, which never begins: 60 lines that are new, or one again and
# again.
STAND_IN = """
import os, signal, sys, time

if os.path.basename(sys.orig_argv[1] if len(sys.orig_argv) > 1 else "") == "vllm":
    advances = os.environ["STAND_IN"] == "advances"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number = 0
    while not advances or number < 60:
        number += 1
        said = "x" * number if advances else "It waits"
        print(f"13:00:{number} {said}", flush=True)
        time.sleep(0.2)
    os._exit(3)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What passes all checks before vLLM."""
    directory = tmp_path_factory.mktemp("small")
    source = directory / "hf"
    source.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file({"w": torch.ones(8)}, source / "model.safetensors", {"format": "pt"})
    pack(source, str(directory / "bundle"), access=Access())
    return directory / "bundle"


@pytest.mark.parametrize(
    ("does", "code", "reason"), [("waits", 70, "start_stalled"), ("advances", 3, "engine")]
)
def test_f18_a_start_that_comes_to_a_stand_is_ended(
    tmp_path: Path, bundle: Path, does: str, code: int, reason: str
) -> None:
    """F18: what it prints again and again is no advance. One that takes twice the deadline, and
    prints something new meanwhile, is left alone."""
    port, metrics_port = free_ports(2)
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
        "STAND_IN": does,
        "TENSORSERVE_PASS_ENV": "STAND_IN",
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_STATE_DIR": str(tmp_path / "state"),
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_METRICS_HOST": "127.0.0.1",
        "TENSORSERVE_PORT": str(port),
        "TENSORSERVE_METRICS_PORT": str(metrics_port),
        "TENSORSERVE_FETCH_DEADLINE": "5",
        "TENSORSERVE_START_DEADLINE": "6",
        "TENSORSERVE_FAILURE_LINGER": "0",
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        up = subprocess.Popen(
            [PROGRAM, "up"], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        assert up.wait(120) == code, log.read_text()
        wait_for(lambda: session_processes(up.pid) == [])
    finally:
        end_session(up)
    state = read_state(events_path(tmp_path / "state"))
    assert state.failure is not None
    assert (state.failure.reason, state.engine_exit) == (reason, code)
    text = log.read_text()
    assert ("in the phase import: no byte was loaded" in text) == (does == "waits")
    assert text.count(" It waits\n" if does == "waits" else "x\n") > 20
