"""The variables of vLLM's CPU build, before vLLM has set them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tensorserve.launch.cpu_environment import cpu_environment

GIVEN = ("", "/usr/lib/libnone.so", "/x/libiomp5.so")
# vLLM's own code, on configurations of its own making, in a process of its own. LD_PRELOAD is set
# inside, so that the linker does not look for libraries that are not there.
VLLM = """
import json, os, sys
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform

names = ("LD_PRELOAD", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS")
found = {}
for given in sys.argv[1:]:
    os.environ.pop(names[1], None)
    os.environ[names[0]] = given
    CpuPlatform.check_and_update_config(VllmConfig())
    found[given] = {name: os.environ[name] for name in names}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def set_by_vllm() -> dict[str, dict[str, str]]:
    """{LD_PRELOAD as given: the variables that vLLM has set}; one import of vLLM for all."""
    environ = {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", VLLM, *GIVEN],
        env=environ,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("given", GIVEN)
def test_it_is_what_vllm_sets(given: str, set_by_vllm: dict[str, dict[str, str]]) -> None:
    """The same text: a forked process may only differ in what was never preloaded."""
    assert cpu_environment({"LD_PRELOAD": given} if given else {}) == set_by_vllm[given]
