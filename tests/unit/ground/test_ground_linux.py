"""What a process leaves when it crashes, and who may look into it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tensorserve.linux import processor_flags

NOBODY = 65534


def run(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        **options,  # type: ignore[call-overload]
    )


def test_a_crash_leaves_no_core_also_in_children_and_across_exec(tmp_path: Path) -> None:
    """vLLM is exec'd, and spawns its workers: what the kernel forgets at exec would not help."""
    code = """
import os, resource, sys
from contextlib import suppress
with suppress(ValueError):
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, resource.RLIM_INFINITY))
if sys.argv[1] == "safe":
    from tensorserve.linux import no_core_files
    no_core_files()
child = os.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-c", "import os; os.abort()"])
print(os.WCOREDUMP(os.waitpid(child, 0)[1]))
"""
    assert run(code, "safe", cwd=tmp_path).stdout.strip() == "False"
    assert not list(tmp_path.iterdir())
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if hard == resource.RLIM_INFINITY and pattern.strip() == "core":
        assert run(code, "unsafe", cwd=tmp_path).stdout.strip() == "True", "the test can fail"


HOLD = f"""
import ctypes, os, subprocess, sys
from tensorserve.launch.handoff import publish
from tensorserve.linux import PR_SET_DUMPABLE, hide_memory, no_core_files
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as after an exec
no_core_files()
reference = publish(b"handed over")
if sys.argv[1] == "hidden":
    hide_memory()
child = subprocess.run(["cat", reference], capture_output=True, text=True, cwd="/")
print(child.stdout.strip() or child.stderr.strip())
print(open(reference).read())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_hidden_process_can_hand_nothing_over() -> None:
    """Why `up` and `serve` are not hidden: as an ordinary user, as in the image, others could not
    open what they published. The core limit alone costs nothing, and each can open its own.
    """
    assert run(HOLD, "open").stdout.splitlines() == ["handed over", "handed over"]
    refused, own = run(HOLD, "hidden").stdout.splitlines()
    assert "Permission denied" in refused
    assert own == "handed over"


@pytest.mark.parametrize(
    ("command", "hidden"), [("report", True), ("check", True), ("up", False), ("serve", False)]
)
def test_commands_that_hand_nothing_over_are_hidden(command: str, hidden: bool) -> None:
    """`verify` and `pack` hold keys as the engine does."""
    code = """
import ctypes, sys
from tensorserve import cli
found = lambda *_: print("dumpable", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)) or 0
cli._COMMANDS = dict.fromkeys(cli._COMMANDS, found)
cli.main([sys.argv[1]])
"""
    assert run(code, command).stdout.strip() == f"dumpable {int(not hidden)}"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor\t: 0\nflags\t\t: sse2 avx2\n\nprocessor\t: 1\nflags\t: fpu\n",
            ("avx2", "sse2"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd\n", ("asimd", "fp")),
        ("cpu family\t: 6\nvmx flags\t: ept\n", ()),
    ],
)
def test_processor_flags_are_those_of_the_first_one(
    tmp_path: Path, text: str, flags: tuple[str, ...]
) -> None:
    """On x86 and on Arm."""
    path = tmp_path / "cpuinfo"
    path.write_text(text)

    assert processor_flags(str(path)) == flags


def test_this_processor_has_flags() -> None:
    """As the kernel writes them today."""
    assert processor_flags()
