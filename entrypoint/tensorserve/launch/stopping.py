"""How long may a start take to stop before its processes are killed?"""

from __future__ import annotations

# Nothing that vLLM does while loading is worth waiting for, and a start that is told to stop is
# gone within 5 s: docker waits for 10 s by default.
LOADING_SECONDS = 2.0
# While serving, vLLM drains for as long as it was told (--shutdown-timeout) and gets this on top.
SERVING_SECONDS = 5.0
# supervisord ends after the engine, and `up` after supervisord.
_ABOVE_SECONDS = 1.5


def engine_seconds(drain_seconds: float, *, serving: bool) -> float:
    """Seconds that vLLM has, from the signal on."""
    return drain_seconds + SERVING_SECONDS if serving else LOADING_SECONDS


def supervisor_seconds(drain_seconds: float, *, serving: bool) -> float:
    """Seconds that supervisord has, with all that it runs."""
    return engine_seconds(drain_seconds, serving=serving) + _ABOVE_SECONDS
