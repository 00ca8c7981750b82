"""What does a forked process take over from its caller, as a spawned one does?

A spawned process inherits the environment, limits, processors and umask of its caller by `exec`,
and its libraries read the environment when they are loaded. A process that the fork server forks
inherits the fork server's, and gets the caller's with the data that it is started with.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import util
from typing import Self

_LIMITS = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))


@dataclass(frozen=True)
class CallerState:
    """What `exec` hands over."""

    environment: dict[str, str]
    limits: dict[int, tuple[int, int]]
    """{resource: (soft, hard)}, as resource.getrlimit gives them."""
    processors: frozenset[int]
    umask: int

    @classmethod
    def current(cls) -> Self:
        """That of this process."""
        umask = os.umask(0o077)
        os.umask(umask)
        limits = {number: resource.getrlimit(number) for number in _LIMITS}
        return cls(dict(os.environ), limits, frozenset(os.sched_getaffinity(0)), umask)

    def take_over(self, imported: Mapping[str, str]) -> None:
        """Apply it to this process, which was just forked by the fork server.

        `imported`: variables that the fork server's imports have set, as a spawned process's own
        would; the caller's win.
        """
        # Of the fork server's: a spawned process has none.
        util._finalizer_registry.clear()  # type: ignore[attr-defined]
        util._run_after_forkers()  # type: ignore[attr-defined]
        before = dict(os.environ)
        wanted = dict(imported) | self.environment
        for name in before.keys() - wanted.keys():
            del os.environ[name]
        for name, value in wanted.items():
            if before.get(name) != value:
                os.environ[name] = value
        for number, limits in self.limits.items():
            if resource.getrlimit(number) != limits:
                resource.setrlimit(number, limits)
        os.umask(self.umask)
        _run_threads(before, wanted, self.processors)
        # Python's `random` sees to itself; numpy would give the same numbers in each process.
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()


def _run_threads(
    before: Mapping[str, str], wanted: Mapping[str, str], processors: frozenset[int]
) -> None:
    """OpenMP's threads as the environment says: their number, and where they run.

    libgomp binds each of its threads to one processor of GOMP_CPU_AFFINITY when it is loaded with
    it. Here all threads of the process run on these processors.
    """
    binding = wanted.get("GOMP_CPU_AFFINITY", "")
    if binding != before.get("GOMP_CPU_AFFINITY", ""):
        processors = frozenset(int(word) for word in binding.split())
    if processors != os.sched_getaffinity(0):
        os.sched_setaffinity(0, processors)
    count = wanted.get("OMP_NUM_THREADS", "")
    if count != before.get("OMP_NUM_THREADS", "") and "torch" in sys.modules:
        # Sets the size of the pool; no thread is started yet.
        sys.modules["torch"].set_num_threads(int(count))
