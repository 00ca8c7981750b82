"""How does vLLM's import begin in the first second, beside the checks?

`serve` forks. The child checks, fetches the small files and hands the start over; the process that
supervisord knows becomes vLLM's program at once. The program imports, and waits for the child's
answer: what it shall run, or how the child ended. The child's memfds (launch/handoff.py) must live
as long as the engine, so it ends as a small program that does nothing but hold them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tensorserve.errors import TensorserveError
from tensorserve.linux import end_with_parent

# JSON of a Checker: how the program finds the process that checks.
CHECKER_VARIABLE = "TENSORSERVE_INTERNAL_CHECKER"
_MAX_BYTES = 16 * 1024 * 1024
# Signals of a terminal or a service manager that are meant for the engine.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# -I, -S: neither site packages nor the user's folders are needed, which keeps it at a few MiB.
_HOLD = ("-I", "-S", "-c", "import signal\nwhile True: signal.pause()  # tensorserve: held memory")


@dataclass(frozen=True)
class Program:
    """What vLLM's program shall run."""

    arguments: tuple[str, ...]
    """After the interpreter: the program and the words for it."""
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Checker:
    """The process that checks, as the importing program sees it."""

    pid: int
    descriptor: int
    """The program's end of the socket between the two."""
    events: str
    """Path of the event log."""
    interruptible: bool
    """Whether SIGINT is to end the program: a shell's background jobs are born with it ignored."""


def import_beside(prepare: Callable[[], Program], program: Program, events: Path) -> NoReturn:
    """Exec `program` in this process while a child runs `prepare` and answers it.

    In the child the errors of `prepare` are raised: it ends as `serve` would have, and the
    program ends with the child's exit code.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        theirs.close()
        end_with_parent()
        if os.getppid() != parent:
            raise TensorserveError("The engine ended before its checks began.")
        _answer(ours, prepare)
    ours.close()
    theirs.set_inheritable(True)
    # The child decides what Ctrl-C means until it has answered.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    checker = Checker(child, theirs.fileno(), str(events), before != signal.SIG_IGN)
    environment = dict(program.environment) | {CHECKER_VARIABLE: json.dumps(asdict(checker))}
    os.execve(sys.executable, [sys.executable, *program.arguments], environment)


def _answer(connection: socket.socket, prepare: Callable[[], Program]) -> NoReturn:
    try:
        program = prepare()
        connection.sendall(json.dumps(asdict(program)).encode())
    finally:
        # Not only closed: processes that `prepare` has forked have the socket as well.
        with suppress(OSError):  # the program has ended
            connection.shutdown(socket.SHUT_RDWR)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.execve(sys.executable, [sys.executable, *_HOLD], {})


def receive_program(checker: Checker) -> Program:
    """What the child answers; waits for it. SystemExit with the child's code where it failed."""
    with socket.socket(fileno=checker.descriptor) as connection:
        received = bytearray()
        while len(received) <= _MAX_BYTES and (more := connection.recv(65536)):
            received += more
    if not received:
        raise SystemExit(_exit_code(checker.pid))
    document = json.loads(received)
    return Program(tuple(document["arguments"]), document["environment"])


def _exit_code(child: int) -> int:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    return code or TensorserveError.exit_code


def current_checker(environ: Mapping[str, str]) -> Checker | None:
    """The checker of this process, if `import_beside` has exec'd it."""
    given = environ.get(CHECKER_VARIABLE)
    return None if given is None else Checker(**json.loads(given))
