"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(
    condition: Callable[[], object],
    seconds: float = 10.0,
    *,
    every: float = 0.01,
    said: Callable[[], object] = lambda: "the condition did not come true",
) -> None:
    """Return once `condition` holds, asked `every` so many seconds; fail after `seconds`.

    A condition that can never hold any more should raise. `said` tells of the failure: a log, say.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {said()}"
        time.sleep(every)
