"""Lets vLLM fork its processes, where PYTHONPATH names this folder (running.py, `forking`).

vLLM's CPU build spawns its engine core and its workers, and each of them imports vLLM again: of the
40 s that a start takes here, 26. Python runs this file before any other code of a program.
"""

import sys
from pathlib import PurePath

# vLLM's own command.
if "vllm" in {PurePath(word).name for word in sys.orig_argv[1:2]}:
    import multiprocessing

    _get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _method=None: _get_context("fork")
