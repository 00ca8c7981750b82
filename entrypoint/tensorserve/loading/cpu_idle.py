"""Which part of the processors' time is idle? As /proc/stat counts it, for the whole machine."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_STAT = Path("/proc/stat")
# user, nice, system, idle, iowait, irq, softirq, steal (man 5 proc_stat); guests' are in user's.
_FIELDS = 8
_IDLE, _IOWAIT = 3, 4


class CpuIdle:
    """Call it: the part of the time of `processors` that was idle since the call before, 0 to 1."""

    def __init__(self, processors: Collection[int], stat: Path = _STAT) -> None:
        self._names = {f"cpu{number}" for number in processors}
        self._stat = stat
        self._before = (0, 0)

    def __call__(self) -> float:
        """1 where /proc/stat cannot be read, as in sandboxes that hide it."""
        idle = total = 0
        try:
            for line in self._stat.read_text().splitlines():
                name, *counts = line.split()
                if name in self._names:
                    ticks = [int(count) for count in counts[:_FIELDS]]
                    idle += ticks[_IDLE] + ticks[_IOWAIT]
                    total += sum(ticks)
        except (OSError, ValueError, IndexError):
            return 1.0
        had_idle, had_total = self._before
        self._before = idle, total
        return (idle - had_idle) / (total - had_total) if total > had_total else 1.0
