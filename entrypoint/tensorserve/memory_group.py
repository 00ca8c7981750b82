"""How much memory may this container still take, and has the kernel ended one of it for that?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Below the root.
CGROUPS, _MEMINFO = Path("sys/fs/cgroup"), Path("proc/meminfo")
_OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """What the control group of this process says; None: there is none, or it does not say."""

    limit: int | None = None  # bytes
    used: int | None = None  # bytes
    idle: int | None = None
    """Bytes of them that are files' pages, which the kernel takes back first."""
    peak: int | None = None  # bytes, the most that were in use; needs Linux 5.19 in version 2
    kills: int | None = None
    """Processes that the kernel has ended for lack of memory, here and below, ever."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes still to be had: the machine's, or what the control group leaves of its limit if less.

    Of a control group's use, pages of files that were not used lately are no use: the kernel takes
    them back first. None where nothing is known.
    """
    available = None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / _MEMINFO) or "", re.MULTILINE)
    if found:
        available = int(found[1]) * 1024
    group = memory_group(root / CGROUPS)
    if group.limit is not None and group.used is not None:
        left = max(0, group.limit - group.used + min(group.used, group.idle or 0))
        available = left if available is None else min(left, available)
    return available


def memory_group(root: Path = Path("/") / CGROUPS) -> MemoryGroup:
    """The control group of this process, version 2 or 1. Whatever cannot be read is None."""
    for directory in _directories(root):
        if (limit := _text(directory / "memory.max")) is not None:
            used = _number(_text(directory / "memory.current"))
            kills = _count(_text(directory / "memory.events"), "oom_kill")
            peak = _number(_text(directory / "memory.peak"))
            idle = _count(_text(directory / "memory.stat"), "inactive_file")
            return MemoryGroup(_number(limit), used, idle, peak, kills)
        if (limit := _text(directory / "memory.limit_in_bytes")) is not None:
            used = _number(_text(directory / "memory.usage_in_bytes"))
            kills = _count(_text(directory / "memory.oom_control"), "oom_kill")
            peak = _number(_text(directory / "memory.max_usage_in_bytes"))
            idle = _count(_text(directory / "memory.stat"), "total_inactive_file")
            return MemoryGroup(_number(limit), used, idle, peak, kills)
    return MemoryGroup()


def _directories(root: Path) -> Iterator[Path]:
    """Where the files may be: a container mostly sees its own group as the root."""
    own = {}
    for line in (_text(_OWN) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    yield root / own.get("", "")
    yield root
    yield root / "memory" / own.get("memory", "")
    yield root / "memory"


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    """Version 2 says "max" and version 1 a number near 2^63 where there is no limit."""
    if text is None or not re.fullmatch(r"[0-9]{1,19}", text.strip()) or int(text) >= 2**62:
        return None
    return int(text)


def _count(text: str | None, name: str) -> int | None:
    found = re.search(rf"^{name} (\d{{1,18}})$", text or "", re.MULTILINE)
    return int(found[1]) if found else None
