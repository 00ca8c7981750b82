"""How much memory is left for this container, and has the kernel killed its processes for it?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Relative to the root directory.
CGROUPS, _MEMINFO = Path("sys/fs/cgroup"), Path("proc/meminfo")
_OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """The memory values of a control group. None: no limit, or the value cannot be read."""

    limit: int | None = None  # bytes
    used: int | None = None  # bytes
    reclaimable: int | None = None
    """Bytes of `used` that the kernel reclaims before it kills a process: page cache, dentries and
    inodes."""
    peak: int | None = None  # bytes, the maximum of `used`; version 2 needs Linux 5.19
    kills: int | None = None
    """Processes that the kernel has killed for lack of memory, in this group and below."""
    high: int | None = None
    """Bytes above which the kernel throttles the group's processes while it reclaims memory."""

    @property
    def left(self) -> int | None:
        """Bytes that are left within the limit; None without a limit or a known use."""
        limits = [limit for limit in (self.limit, self.high) if limit is not None]
        if not limits or self.used is None:
            return None
        # The values are read one after another, so that `reclaimable` may exceed `used`.
        needed = self.used - min(self.used, self.reclaimable or 0)
        return max(0, min(limits) - needed)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of available memory: the machine's, or a control group's if that is less.

    As in the kernel's MemAvailable (Documentation/filesystems/proc.rst), reclaimable page cache and
    slabs count as available: they may hold a model that was just copied or verified. Pages of tmpfs
    count as used. Swap does not count, since swapped weights cannot be served. None if nothing is
    known.
    """
    known = [group.left for group in _groups(root / CGROUPS)]
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / _MEMINFO) or "", re.MULTILINE)
    if found:
        known.append(int(found[1]) * 1024)
    return min((left for left in known if left is not None), default=None)


def memory_group(root: Path = Path("/") / CGROUPS) -> MemoryGroup:
    """The control group of this process, version 2 or 1. A value that cannot be read is None."""
    return next(_groups(root), MemoryGroup())


def _groups(root: Path) -> Iterator[MemoryGroup]:
    """The group of this process and its ancestors, whose limits apply too."""
    own = {}
    for line in (_text(_OWN) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    unified = list(_unified(root, own.get("", "")))
    yield from unified or _version_1(root / "memory", own.get("memory", ""))


def _unified(root: Path, own: str) -> Iterator[MemoryGroup]:
    for directory in _upwards(root, own):
        if (limit := _text(directory / "memory.max")) is None:
            continue
        stat = _text(directory / "memory.stat")
        yield MemoryGroup(
            limit=_number(limit),
            used=_number(_text(directory / "memory.current")),
            reclaimable=_sum(stat, "inactive_file", "active_file", "slab_reclaimable"),
            peak=_number(_text(directory / "memory.peak")),
            kills=_count(_text(directory / "memory.events"), "oom_kill"),
            high=_number(_text(directory / "memory.high")),
        )


def _version_1(root: Path, own: str) -> Iterator[MemoryGroup]:
    found = False
    for directory in _upwards(root, own):
        if (limit := _text(directory / "memory.limit_in_bytes")) is None:
            continue
        # In version 1, a group can be configured not to count its descendants.
        if found and (_text(directory / "memory.use_hierarchy") or "1").strip() == "0":
            return
        found = True
        stat = _text(directory / "memory.stat")
        yield MemoryGroup(
            limit=_number(limit),
            used=_number(_text(directory / "memory.usage_in_bytes")),
            reclaimable=_sum(stat, "total_inactive_file", "total_active_file"),
            peak=_number(_text(directory / "memory.max_usage_in_bytes")),
            kills=_count(_text(directory / "memory.oom_control"), "oom_kill"),
        )


def _upwards(root: Path, own: str) -> Iterator[Path]:
    """Directories from the group's own to the root. In a container, the root is usually its own."""
    parts = Path(own).parts
    if ".." not in parts:  # ".." is outside the mounted hierarchy
        for count in range(len(parts), 0, -1):
            yield root.joinpath(*parts[:count])
    yield root


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    """A limit in bytes. None for no limit: "max" in version 2, a number near 2^63 in version 1."""
    if text is None or not re.fullmatch(r"[0-9]{1,19}", text.strip()) or int(text) >= 2**62:
        return None
    return int(text)


def _count(text: str | None, name: str) -> int | None:
    found = re.search(rf"^{name} (\d{{1,18}})$", text or "", re.MULTILINE)
    return int(found[1]) if found else None


def _sum(text: str | None, *names: str) -> int | None:
    found = [count for name in names if (count := _count(text, name)) is not None]
    return sum(found) if found else None
