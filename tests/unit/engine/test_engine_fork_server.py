"""Processes that `multiprocessing` would spawn, forked by a server: real ones, without vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import end_session, session_processes

from waiting import wait_for

# A module that is slow to import stands for vLLM: who has imported it is in its variable.
MODULE = "import os\nIMPORTED_BY = os.getpid()\n"
PROGRAM = """
import json, multiprocessing, os, resource, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))

def look(channel):
    import heavy
    channel.send({
        "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp(),
        "imported_by": heavy.IMPORTED_BY, "environment": dict(os.environ),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "processors": sorted(os.sched_getaffinity(0)), "directory": os.getcwd(),
        "name": multiprocessing.current_process().name,
    })

def threads(channel):
    import torch
    channel.send({"threads": torch.get_num_threads(), "on": sorted(os.sched_getaffinity(0))})

def look_below(channel):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=look, args=(theirs,), name="below")
    child.start()
    channel.send(ours.recv())
    child.join()

def end(code):
    os._exit(code)

def crash():
    raise ValueError("of the worker")

def sleep():
    time.sleep(600)

def run(target, *arguments, name="child"):
    child = multiprocessing.get_context("spawn").Process(target=target, args=arguments, name=name)
    child.start()
    return child

def ask(target=look, name="child"):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = run(target, theirs, name=name)
    answer = ours.recv()
    child.join()
    return answer | {"exitcode": child.exitcode}

if __name__ == "__main__":
    from tensorserve.engine import fork_server
    told = []
    def later():
        import heavy
        exec(os.environ.get("LATER", ""))
    server = fork_server.start(folder, later, lambda *what: told.append(what))
    answer = None
    exec(sys.argv[2])
    found = {"pid": os.getpid(), "server": server, "answer": answer, "told": told}
    print(json.dumps(found), flush=True)
"""


def run_program(folder: Path, act: str, **environ: str) -> dict[str, Any]:
    """What the program says after `act`; it must end with 0 and leave nothing."""
    program = start_program(folder, act, **environ)
    try:
        out, _ = program.communicate(timeout=60)
        assert program.returncode == 0
        wait_for(lambda: not session_processes(program.pid))
    finally:
        end_session(program)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def start_program(folder: Path, act: str, **environ: str) -> subprocess.Popen[str]:
    """The program, in a session of its own."""
    (folder / "heavy.py").write_text(MODULE)
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(folder / "program.py"), str(folder), act],
        env=dict(os.environ) | environ,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        start_new_session=True,
    )


def test_a_process_is_forked_from_the_import(tmp_path: Path) -> None:
    """It has the server's modules, and is found in the program's process group."""
    found = run_program(tmp_path, "answer = ask(name='core')")
    answer = found["answer"]
    assert found["told"] == [["core", "fork", None]]
    assert answer["imported_by"] == answer["parent"] == found["server"]
    # The program leads its session, and so its group.
    assert (answer["name"], answer["exitcode"], answer["group"]) == ("core", 0, found["pid"])


def test_what_a_forked_process_starts_is_forked_too(tmp_path: Path) -> None:
    """vLLM's engine core starts the workers."""
    found = run_program(tmp_path, "answer = ask(look_below)")
    assert found["answer"]["name"] == "below"
    assert found["answer"]["imported_by"] == found["answer"]["parent"] == found["server"]


def test_the_caller_hands_over_what_exec_would(tmp_path: Path) -> None:
    """Its variables of that moment, limits, processors and directory."""
    processor = min(os.sched_getaffinity(0))
    act = (
        "os.environ['LOCAL_WORLD_SIZE'] = '7'\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 100))\n"
        f"os.sched_setaffinity(0, {{{processor}}})\n"
        "os.chdir('/')\n"
        "answer = ask()"
    )
    answer = run_program(tmp_path, act)["answer"]
    assert answer["imported_by"] == answer["parent"]
    assert answer["environment"]["LOCAL_WORLD_SIZE"] == "7"
    assert answer["files"] == 99
    assert answer["processors"] == [processor]
    assert answer["directory"] == "/"


def test_a_variable_that_is_gone_is_gone_in_the_child(tmp_path: Path) -> None:
    """As at a spawn."""
    act = "del os.environ['LOCAL_WORLD_SIZE']\nanswer = ask()"
    answer = run_program(tmp_path, act, LOCAL_WORLD_SIZE="1")["answer"]
    assert "LOCAL_WORLD_SIZE" not in answer["environment"]
    assert answer["imported_by"] == answer["parent"]


def test_what_imports_have_set_stays(tmp_path: Path) -> None:
    """A spawned process would import it, and have it set itself."""
    act = "answer = ask(look_below)"
    found = run_program(tmp_path, act, LATER="os.environ['SET_BY_IMPORT'] = '1'")
    assert found["answer"]["environment"]["SET_BY_IMPORT"] == "1"
    assert found["answer"]["imported_by"] == found["server"]


def test_what_the_programs_own_imports_set_is_no_reason(tmp_path: Path) -> None:
    """The child gets it from its caller."""
    act = "os.environ['SET_BY_IMPORT'] = '1'\nfork_server.imports_are_done()\nanswer = ask()"
    found = run_program(tmp_path, act)
    assert found["told"] == [["child", "fork", None]]
    assert found["answer"]["environment"]["SET_BY_IMPORT"] == "1"


def test_openmp_is_told_its_number_of_threads(tmp_path: Path) -> None:
    """torch was loaded without it."""
    act = (
        "os.environ['OMP_NUM_THREADS'] = '3'\n"
        "os.environ['GOMP_CPU_AFFINITY'] = str(min(os.sched_getaffinity(0)))\n"
        "answer = ask(threads)"
    )
    found = run_program(tmp_path, act, LATER="import torch", OMP_NUM_THREADS="2")
    assert found["told"] == [["child", "fork", None]]
    assert found["answer"]["threads"] == 3
    assert found["answer"]["on"] == [min(os.sched_getaffinity(0))]


@pytest.mark.parametrize(
    ("act", "later", "reason"),
    [
        pytest.param(
            "os.environ['SOMETHING'] = '1'", "", "set since the import: SOMETHING", id="a variable"
        ),
        pytest.param(
            "",
            "import threading\n"
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "threads that a fork would not copy",
            id="a thread of the server",
        ),
        pytest.param("", "raise RuntimeError('broken')", "the fork server ended", id="no import"),
        pytest.param(
            "ask(); os.kill(server, signal.SIGKILL); os.waitpid(server, 0)",
            "",
            "the fork server ended",
            id="killed",
        ),
    ],
)
def test_a_process_is_spawned_for_a_reason(
    tmp_path: Path, act: str, later: str, reason: str
) -> None:
    """It imports by itself then, and works as well."""
    found = run_program(tmp_path, f"{act}\nanswer = ask()", LATER=later)
    way, said = found["told"][-1][1:]
    answer = found["answer"]
    assert answer["exitcode"] == 0
    assert way == "spawn"
    assert said.startswith(reason)
    assert answer["parent"] == found["pid"]
    assert answer["imported_by"] == answer["pid"]


def test_exit_codes_are_those_of_the_process(tmp_path: Path) -> None:
    """A code of its own, an exception with its traceback on stderr, a signal."""
    act = (
        "children = [run(end, 7), run(crash), run(sleep)]\n"
        "children[2].kill()\n"
        "[child.join() for child in children]\n"
        "answer = [child.exitcode for child in children]"
    )
    assert run_program(tmp_path, act)["answer"] == [7, 1, -9]
    assert "ValueError: of the worker" in (tmp_path / "stderr").read_text()


def test_the_sentinel_tells_of_the_end(tmp_path: Path) -> None:
    """vLLM waits for sentinels of its engine core and its workers."""
    act = (
        "from multiprocessing.connection import wait\n"
        "child = run(sleep)\n"
        "before = wait([child.sentinel], 0.1)\n"
        "os.kill(child.pid, signal.SIGKILL)\n"
        "answer = [before, wait([child.sentinel], 30) == [child.sentinel], child.exitcode]"
    )
    assert run_program(tmp_path, act)["answer"] == [[], True, -9]


@pytest.mark.parametrize("victim", ["program", "server"])
def test_a_killed_process_leaves_nothing(tmp_path: Path, victim: str) -> None:
    """The server ends with the program, and its processes with the server."""
    act = (
        "child = run(sleep)\n"
        "print(json.dumps({'server': server, 'child': child.pid}), flush=True)\n"
        "child.join()\nanswer = child.exitcode"
    )
    program = start_program(tmp_path, act)
    try:
        assert program.stdout is not None
        pids = json.loads(program.stdout.readline())
        assert {pids["server"], pids["child"]} <= set(session_processes(program.pid))
        os.kill(program.pid if victim == "program" else pids["server"], signal.SIGKILL)
        wait_for(lambda: pids["child"] not in session_processes(program.pid))
        out, _ = program.communicate(timeout=30)
        if victim == "server":
            assert json.loads(out)["answer"] == 255
        wait_for(lambda: not session_processes(program.pid))
    finally:
        end_session(program)
