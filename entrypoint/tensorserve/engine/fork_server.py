"""Who forks vLLM's processes? A server that was forked when the program had imported what all need.

vLLM starts its processes with multiprocessing's `spawn` (VLLM_WORKER_MULTIPROC_METHOD, which
`vllm serve` sets: vllm/entrypoints/serve/utils/api_utils.py:166, 0.32.0). After `start`, a process
that is to be spawned is forked by the server instead, over the protocol of the standard library's
`forkserver` (multiprocessing/forkserver.py, Python 3.11), unless there is a reason to spawn it
(engine/fork_or_spawn.py). vLLM itself is not changed.

The server is a child of vLLM's first process, and the parent of all others. It ends with the first
process, and they end with it.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection, context, forkserver, process, spawn
from pathlib import Path
from typing import Any

from tensorserve.engine.fork_or_spawn import (
    open_files,
    other_threads,
    why_no_server,
    why_spawn,
)
from tensorserve.engine.forked_state import CallerState
from tensorserve.linux import end_with_parent

_STATE = "tensorserve_caller"
# A Unix socket's path has 107 bytes at most (unix(7)).
_LONGEST_ADDRESS = 100
Told = Callable[[str, str, str | None], None]
"""Called for each process: its name, fork or spawn, and why it is spawned."""

_get_preparation_data = spawn.get_preparation_data
_prepare = spawn.prepare


@dataclass
class _Server:
    """What a process that may start others knows of the server."""

    environment: dict[str, str]
    """With which it was forked."""
    told: Told
    status: int | None
    """Descriptor of the pipe on which it says whether it serves; None: it does."""
    refusal: str | None = None
    pid: int = 0
    """Of the server; known to it and to processes that it has forked."""
    imported: dict[str, str] = field(default_factory=dict)
    """Variables that imports have set since, in this process or, where it forked this, there."""

    def imports_are_done(self) -> None:
        """Note what imports have set; nothing else must have changed a variable."""
        before = self.environment
        self.imported = {n: v for n, v in os.environ.items() if before.get(n) != v}

    def why_spawn(self) -> str | None:
        if self.status is not None:
            with open(self.status, "rb") as pipe:
                said = pipe.read().decode()
            self.status = None
            self.refusal = said[1:] if said else "the fork server ended"
        imported = {n: v for n, v in self.imported.items() if os.environ.get(n) == v}
        return self.refusal or why_spawn(self.environment | imported, os.environ)


_server: _Server | None = None


def start(folder: Path, later: Callable[[], None], told: Told) -> int:
    """Fork the server, and have `spawn` ask it from now on. Gives its process id.

    `folder`: this user's alone, for the server's socket. `later`: imports that only vLLM's other
    processes need; the server does them while this process goes on.
    """
    global _server
    listener = socket.socket(socket.AF_UNIX)
    address = str(folder / "fork-server")
    if len(os.fsencode(address)) > _LONGEST_ADDRESS:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    Path(address).unlink(missing_ok=True)
    listener.bind(address)
    Path(address).chmod(0o600)
    listener.listen()
    alive_r, alive_w = os.pipe()
    status_r, status_w = os.pipe()
    _server = _Server(dict(os.environ), told, status_r)
    spawn.get_preparation_data = _with_state
    spawn.prepare = _take_over
    context.SpawnProcess._Popen = staticmethod(_popen)  # type: ignore[method-assign]
    known: Any = forkserver._forkserver
    known.ensure_running = lambda: None
    sys.stdout.flush()
    sys.stderr.flush()
    # What is alive now stays so; the collector would write to its pages in each process. To collect
    # first takes half a second, and little of what an import makes is garbage.
    gc.freeze()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(alive_w)
        os.close(status_r)
        _run(parent, listener, alive_r, status_w, later)
    os.close(alive_r)
    os.close(status_w)
    listener.close()
    known._forkserver_address, known._forkserver_alive_fd = address, alive_w
    return pid


def imports_are_done() -> None:
    """Called by the process that has started the server, when it has done its own imports."""
    assert _server is not None
    _server.imports_are_done()


def _run(
    parent: int, listener: socket.socket, alive: int, status: int, later: Callable[[], None]
) -> None:
    """In the server, until the last process that could ask has ended. Does not return."""
    code = 1
    try:
        end_with_parent()
        if os.getppid() == parent:
            code = _serve(listener, alive, status, later)
    except SystemExit:
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(listener: socket.socket, alive: int, status: int, later: Callable[[], None]) -> int:
    assert _server is not None
    later()
    gc.collect()
    gc.freeze()
    _server.imports_are_done()
    _server.status, _server.pid = None, os.getpid()
    refusal = why_no_server(other_threads(), open_files())
    os.write(status, f"!{refusal or ''}".encode())
    os.close(status)
    if refusal is None:
        # For processes that were forked here, and start others.
        forkserver.main(listener.detach(), alive, [])
    return 0


def _popen(process_obj: process.BaseProcess) -> Any:
    """In place of SpawnProcess._Popen (multiprocessing/context.py)."""
    from multiprocessing.popen_forkserver import Popen as Forked
    from multiprocessing.popen_spawn_posix import Popen as Spawned

    assert _server is not None
    reason = _server.why_spawn()
    if reason is None:
        try:
            forked = Forked(process_obj)
        except (ConnectionError, FileNotFoundError, EOFError):
            reason = "the fork server ended"
        else:
            _server.told(process_obj.name, "fork", None)
            return forked
    _server.told(process_obj.name, "spawn", reason)
    return Spawned(process_obj)


def _with_state(name: str) -> dict[str, Any]:
    """In place of spawn.get_preparation_data. A spawned process does not look at the addition."""
    return {**_get_preparation_data(name), _STATE: CallerState.current()}


def _take_over(data: Any) -> None:
    """In place of spawn.prepare, in a process that the server has forked."""
    state: CallerState = data.pop(_STATE)
    assert _server is not None
    end_with_parent()
    if os.getppid() != _server.pid:
        os._exit(1)  # it ended before
    state.take_over(_server.imported)
    _prepare(data)
