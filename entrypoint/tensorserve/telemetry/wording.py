"""How are durations, sizes, failures and retries worded on the start page?"""

from __future__ import annotations

from tensorserve.telemetry.names import FAILURES, RETRIES, STATUS_PREFIX

NBSP = "\u00a0"


def duration(seconds: float) -> str:
    """`12 ms`, `35.6 s`, or `2 min 05 s`; spaces do not break, here and in `size`."""
    if seconds < 0.0005:
        return f"0{NBSP}s"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}{NBSP}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{NBSP}min{NBSP}{rest:02d}{NBSP}s"


def size(count: float) -> str:
    """`count` bytes in the largest fitting of B, kB, MB and GB (powers of 1000)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            digits = 2 if unit == "GB" else 1 if count < 100 * factor else 0
            return f"{count / factor:.{digits}f}{NBSP}{unit}"
    return f"{count:.0f}{NBSP}B"


def failed(reason: str, exit_code: int) -> str:
    """That a start failed for `reason`, with its exit code."""
    words = FAILURES[reason].short if reason in FAILURES else reason.replace("_", " ")
    return f"Failed: {words} (exit code{NBSP}{exit_code})"


def retry_words(reason: str) -> str:
    """Why requests were sent again, for the label `reason` of a retry."""
    status = reason.removeprefix(STATUS_PREFIX)
    if status != reason and status.isdigit():
        return f"the source answered {status}"
    return RETRIES.get(reason, reason.replace("_", " "))
