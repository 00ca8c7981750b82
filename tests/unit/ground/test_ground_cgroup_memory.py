"""What the control group says of memory, in both versions and where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.cgroup_memory import MemoryGroup, available_bytes, memory_group


def group(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / f"memory.{name}").write_text(text)
    return root


@pytest.mark.parametrize("below", ["", "own/group"])
def test_version_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """In a container its own group is the root; elsewhere /proc says where it is."""
    own = tmp_path / "cgroup"
    own.write_text(f"0::/{below}\n")
    monkeypatch.setattr("tensorserve.cgroup_memory._OWN", own)
    events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"
    group(
        tmp_path / "fs" / below,
        max="1000\n",
        current="990\n",
        peak="999\n",
        events=events,
        stat="anon 5\ninactive_file 600\n",
    )
    assert memory_group(tmp_path / "fs") == MemoryGroup(1000, 990, 600, 999, 2)


def test_version_1_is_read(tmp_path: Path) -> None:
    """Older hosts."""
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
    group(tmp_path / "memory", limit_in_bytes="1000", usage_in_bytes="7", oom_control=control)
    assert memory_group(tmp_path) == MemoryGroup(1000, 7, None, None, 5)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "x", ""])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    """Each version has its own way to say so."""
    assert memory_group(group(tmp_path, max=limit, current="5")) == MemoryGroup(None, 5)


def test_without_control_groups_nothing_is_known(tmp_path: Path) -> None:
    """The machine's own figure is left."""
    assert memory_group(tmp_path) == MemoryGroup()


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root directory in which the kernel says that 16 GB are available, and `files`."""
    files = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   16000000 kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 16_384_000_000, id="no group"),
        pytest.param(
            {V2 + "memory.max": "max\n", V2 + "memory.current": "5\n"},
            16_384_000_000,
            id="a group without a limit",
        ),
        pytest.param(
            {V2 + "memory.max": "2000000000\n", V2 + "memory.current": "500000000\n"},
            1_500_000_000,
            id="version 2",
        ),
        pytest.param(
            {
                V2 + "memory.max": "2000000000\n",
                V2 + "memory.current": "1900000000\n",
                V2 + "memory.stat": "file 9\nshmem 8\ninactive_file 1500000000\n",
            },
            1_600_000_000,
            id="version 2, files that were read once",
        ),
        pytest.param(
            {
                V1 + "memory.limit_in_bytes": "2000000000\n",
                V1 + "memory.usage_in_bytes": "1900000000\n",
                V1 + "memory.stat": "inactive_file 3\ntotal_inactive_file 1000000000\n",
            },
            1_100_000_000,
            id="version 1, files that were read once",
        ),
        pytest.param(
            {
                V2 + "memory.max": "14000000000\n",
                V2 + "memory.current": "13900000000\n",
                V2 + "memory.stat": "anon 1900000000\ninactive_file 2000000000\n"
                "active_file 9700000000\nslab_reclaimable 300000000\nshmem 50000000\n",
            },
            12_100_000_000,
            id="version 2, files that were read twice",
        ),
        pytest.param(
            {
                V2 + "memory.max": "max\n",
                V2 + "memory.high": "2000000000\n",
                V2 + "memory.current": "1900000000\n",
            },
            100_000_000,
            id="version 2, throttled above a mark",
        ),
        pytest.param(
            {
                V1 + "memory.limit_in_bytes": "2000000000\n",
                V1 + "memory.usage_in_bytes": "1900000000\n",
                V1 + "memory.stat": "active_file 3\ntotal_active_file 1000000000\n",
            },
            1_100_000_000,
            id="version 1, files that were read twice",
        ),
        pytest.param(
            {V2 + "memory.max": "1000\n", V2 + "memory.current": "5000\n"}, 0, id="over its limit"
        ),
        pytest.param(
            {
                V2 + "memory.max": "1000\n",
                V2 + "memory.current": "900\n",
                V2 + "memory.stat": "inactive_file 5000\n",
            },
            1000,
            id="counted at two moments",
        ),
        pytest.param(
            {V2 + "memory.max": "99000000000\n", V2 + "memory.current": "5\n"},
            16_384_000_000,
            id="a limit beyond the machine",
        ),
    ],
)
def test_what_is_available(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The machine's, or what the control group leaves; pages of files that are unused count."""
    assert available_bytes(machine(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {
                V2 + "pod/container/memory.max": "max\n",
                V2 + "pod/container/memory.current": "5\n",
                V2 + "pod/memory.max": "3000000000\n",
                V2 + "pod/memory.current": "1000000000\n",
            },
            2_000_000_000,
            id="the pod's limit",
        ),
        pytest.param(
            {
                V2 + "pod/container/memory.max": "2000000000\n",
                V2 + "pod/container/memory.current": "500000000\n",
                V2 + "pod/memory.max": "3000000000\n",
                V2 + "pod/memory.current": "2900000000\n",
                V2 + "pod/memory.stat": "active_file 900000000\n",
            },
            1_000_000_000,
            id="the pod has less left",
        ),
        pytest.param(
            {
                V1 + "pod/container/memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "pod/container/memory.usage_in_bytes": "5\n",
                V1 + "pod/memory.limit_in_bytes": "3000000000\n",
                V1 + "pod/memory.usage_in_bytes": "1000000000\n",
            },
            2_000_000_000,
            id="version 1",
        ),
        pytest.param(
            {
                V1 + "pod/container/memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "pod/container/memory.usage_in_bytes": "5\n",
                V1 + "pod/memory.use_hierarchy": "0\n",
                V1 + "pod/memory.limit_in_bytes": "3000000000\n",
                V1 + "pod/memory.usage_in_bytes": "1000000000\n",
            },
            16_384_000_000,
            id="version 1, not counted above",
        ),
        pytest.param(
            {V2 + "memory.max": "2000000000\n", V2 + "memory.current": "500000000\n"},
            1_500_000_000,
            id="only the root is to be seen",
        ),
    ],
)
def test_limits_above_the_own_group_hold_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    """A pod's, a slice's: the kernel looks at all of them."""
    own = tmp_path / "own"
    own.write_text("5:memory:/pod/container\n0::/pod/container\n")
    monkeypatch.setattr("tensorserve.cgroup_memory._OWN", own)
    assert available_bytes(machine(tmp_path, files)) == expected


def test_a_group_outside_of_what_is_mounted_is_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /proc says it of a process that was moved in from elsewhere."""
    own = tmp_path / "own"
    own.write_text("0::/../../elsewhere\n")
    monkeypatch.setattr("tensorserve.cgroup_memory._OWN", own)
    assert memory_group(group(tmp_path / "fs", max="7", current="5")) == MemoryGroup(7, 5)


def test_where_nothing_is_known(tmp_path: Path) -> None:
    """A sandbox that hides it."""
    assert available_bytes(tmp_path) is None


def test_the_machines_own_memory_can_be_read() -> None:
    """More than nothing, less than a petabyte."""
    available = available_bytes()
    assert available is not None
    assert 10**6 < available < 10**15
