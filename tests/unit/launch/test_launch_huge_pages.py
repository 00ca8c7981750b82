"""Large tensors of vLLM's CPU build are in memory for which huge pages were asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorserve.launch.huge_pages import VARIABLE, huge_pages

# The flags of the mapping in which a tensor of 32 MiB is (proc_pid_smaps(5)): hg, if asked for.
PROGRAM = """
import torch
tensor = torch.empty(32 * 2**20, dtype=torch.uint8)
place = tensor.data_ptr() + tensor.numel() // 2
inside = False
for line in open("/proc/self/smaps"):
    first, _, rest = line.partition(" ")
    if not first.endswith(":"):
        start, end = (int(text, 16) for text in first.split("-"))
        inside = start <= place < end
    elif inside and first == "VmFlags:":
        print("hg" in rest.split())
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages"
)
@pytest.mark.parametrize(("given", "asked"), [({}, "True"), ({VARIABLE: "0"}, "False")])
def test_torch_asks_unless_the_user_says_no(given: dict[str, str], asked: str) -> None:
    """The variable is torch's own; a name that it no longer knows would do nothing."""
    environ = {name: text for name, text in os.environ.items() if name != VARIABLE} | given
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environ | huge_pages(environ),
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.split() == [asked]
