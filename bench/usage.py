"""How many seconds, CPU seconds and bytes did a piece of work take, with child processes?"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_SELF = Path("/proc/self")
_SAMPLE_SECONDS = 0.05


class Usage:
    """`with Usage() as usage:`; afterwards `seconds`, `cpu_seconds`, `peak_bytes` are known.

    `peak_bytes` is the most that this process had resident (shared memory and mapped files are part
    of it: VmHWM, reset at the start) minus what it had at the start, plus the most that its
    children had together, which is sampled 20 times a second. So is its own where the kernel (a
    sandbox's) cannot reset VmHWM.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_bytes = 0
        self._children_peak = 0
        self._own_peak = 0
        self._resets = True
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Usage:
        try:
            (_SELF / "clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
        except OSError:
            self._resets = False
        self._baseline = _status_bytes(_SELF, "VmRSS")
        self._sampler.start()
        self._cpu = _cpu_seconds()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = _cpu_seconds() - self._cpu
        peak = _status_bytes(_SELF, "VmHWM" if self._resets else "VmRSS")
        self._stopped.set()
        self._sampler.join()
        if not self._resets:
            peak = max(peak, self._own_peak)
        self.peak_bytes = peak - self._baseline + self._children_peak

    def _sample(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            together = 0
            for child in descendants(os.getpid()):
                with suppress(FileNotFoundError, ProcessLookupError):
                    together += _status_bytes(Path(f"/proc/{child}"), "VmRSS")
            self._children_peak = max(self._children_peak, together)
            if not self._resets:
                self._own_peak = max(self._own_peak, _status_bytes(_SELF, "VmRSS"))


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                for child in (task / "children").read_text().split():
                    found += [int(child), *descendants(int(child))]
    return found


def _cpu_seconds() -> float:
    """Of this process, of the children that ended, and of those that still run."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    return total + sum(cpu_seconds_of(child) for child in descendants(os.getpid()))


def cpu_seconds_of(pid: int) -> float:
    """Of a process, and of its children that have ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # utime, stime and those of its own ended children: proc(5), fields 14 to 17.
        return sum(int(field) for field in fields[11:15]) / _TICK
    return 0.0


def _status_bytes(process: Path, field: str) -> int:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has none
