"""The one import of vLLM: real vLLM and a fork server, but no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import CPU_ENVIRONMENT, clean_environment, session_processes

from waiting import wait_for

SERVE = """
import os, sys
from pathlib import Path
from tensorserve.launch.cpu_environment import cpu_environment
from tensorserve.launch.import_first import Program, import_beside

folder = Path(sys.argv[1])
words = (str(folder / "program.py"), "serve", str(folder))
environment = dict(os.environ) | cpu_environment(os.environ)
final = Program((*words, "--final"), environment | {"TENSORSERVE_INTERNAL_HANDOFF": "here"})
import_beside(lambda: final, Program(words, environment), folder / "events.jsonl")
"""
PROGRAM = """
import json, multiprocessing, os, sys, threading
from pathlib import Path

def look(channel):
    import torch
    tasks = Path("/proc/self/task")
    channel.send({
        "parent": os.getppid(),
        "threads": [(t / "comm").read_text().strip() for t in tasks.iterdir()],
        "modules": [name for name in sys.modules if name.startswith(("vllm.", "tensorserve."))],
        "handoff": os.environ["TENSORSERVE_INTERNAL_HANDOFF"],
        "main": sys.modules["__main__"].__file__,
        "preloaded": os.environ["LD_PRELOAD"].split(":"),
        "loaded": Path("/proc/self/maps").read_text(),
    })

if __name__ == "__main__":
    from tensorserve.engine.import_once import import_beside_checks
    import_beside_checks()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=look, args=(theirs,), name="looker")
    child.start()
    answer = ours.recv()
    child.join()
    names = [thread.name for thread in threading.enumerate()]
    print(json.dumps({"words": sys.argv, "child": answer, "names": names}), flush=True)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program and a process of it say after a real import."""
    folder = tmp_path_factory.mktemp("import")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with (folder / "log").open("w") as log:
        serve = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder)],
            env=clean_environment() | CPU_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    out, _ = serve.communicate(timeout=240)
    assert serve.returncode == 0, (folder / "log").read_text()
    wait_for(lambda: not session_processes(serve.pid))
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    lines = (folder / "events.jsonl").read_text().splitlines()
    return found | {"events": [json.loads(line) for line in lines], "pid": serve.pid}


def test_a_process_is_forked_from_the_import(imported: dict[str, Any]) -> None:
    """The event says so; no thread or device of vLLM's import is in the way."""
    (event,) = imported["events"]
    assert (event["event"], event["process"]) == ("engine_process", "looker")
    assert (event["way"], event.get("reason")) == ("fork", None)
    assert imported["child"]["parent"] != imported["pid"]


def test_it_has_what_a_worker_needs(imported: dict[str, Any]) -> None:
    """The worker, our loader, and the model's class by config.json."""
    assert {
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.gpt2",
        "tensorserve.engine.loader",
    } <= set(imported["child"]["modules"])


def test_no_thread_is_left_over_in_it(imported: dict[str, Any]) -> None:
    """The program's own thread has ended when the checks have answered."""
    assert len(imported["child"]["threads"]) == 1
    assert imported["names"] == ["MainThread"]


def test_it_runs_with_what_the_checks_ended_with(imported: dict[str, Any]) -> None:
    """Words and variables that were not known when the import began."""
    assert imported["words"][1] == "serve"
    assert imported["words"][-1] == "--final"
    assert imported["child"]["handoff"] == "here"
    assert Path(imported["child"]["main"]).name == "program.py"


def test_the_libraries_of_vllms_cpu_build_are_preloaded(imported: dict[str, Any]) -> None:
    """As in a process that vLLM spawns."""
    assert "libgomp" in "".join(imported["child"]["preloaded"])
    assert all(path in imported["child"]["loaded"] for path in imported["child"]["preloaded"])
