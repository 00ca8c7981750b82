"""Run as a program: imports vLLM once, then forks a process for each wish on standard input.

One JSON object a line. {"words": [...], "environment": {...}, "log": PATH} runs `vllm …` or
`tensorserve …` in a new session and answers {"pid": …}; {"wait": pid} answers {"code": …} when
that process has ended. What runs is what would run otherwise, but for four things that cost a start
most of its time here: `exec` becomes a call, vLLM's own processes are forked, a model's class is
looked at without a process for it, and the modules are those that were imported before the fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.cli.serve",
    "vllm.model_executor.models.registry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
    "tensorserve.launch.serve",
    "tensorserve.packing.pack",
    "tensorserve.engine.loader",
)


def main() -> None:
    """Answer wishes until standard input ends."""
    for name in MODULES:
        __import__(name)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        wish = json.loads(line)
        answer = {"code": waited(wish["wait"])} if "wait" in wish else {"pid": forked(wish)}
        print(json.dumps(answer), flush=True)


def waited(pid: int) -> int:
    """The exit code of a process that was forked here, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(wish: dict[str, Any]) -> int:
    """The process that does `wish`."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(wish["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        prepare()
        code = call(wish["words"], wish["environment"])
    except BaseException:  # noqa: BLE001 - the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare() -> None:
    """Let what is started from this process be started from its memory."""
    from vllm.model_executor.models import registry

    real = multiprocessing.get_context
    multiprocessing.get_context = lambda _method=None: real("fork")
    registry._run_in_subprocess = lambda function: function()

    def execve(program: str, argv: list[str], environment: dict[str, str]) -> NoReturn:
        assert program == sys.executable
        raise SystemExit(call(argv[1:], environment))

    os.execve = execve


def call(words: list[str], environment: dict[str, str]) -> int:
    """Run the Python program `words[0]` as `exec` would, in this process; give its code."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    return code_of(lambda: runpy.run_path(words[0], run_name="__main__"))


def code_of(function: Callable[[], object]) -> int:
    """What a process ends with that calls `function` and nothing else."""
    try:
        function()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # A path of its own for what it forks: this folder's modules are no part of a start.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent
    ]
    main()
