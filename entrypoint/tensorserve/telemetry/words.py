"""How are seconds, bytes, failures and retries said, in a few words a person reads?"""

from __future__ import annotations

from tensorserve.telemetry.state import StartState

NBSP = "\u00a0"

FAILURES = {
    "wrong_key": ("wrong key", "The key or passphrase does not open this model."),
    "corrupt": (
        "the model is damaged",
        "A file is damaged, incomplete or was replaced. `tensorserve verify` says which.",
    ),
    "source_unavailable": (
        "the source cannot be reached",
        "Look at the network and the address of the model.",
    ),
    "permission": (
        "no permission",
        "The credentials are missing, wrong, expired or do not suffice.",
    ),
    "configuration": ("wrong configuration", "`tensorserve plan` names each mistake."),
    "usage": ("wrong command", "`tensorserve --help` shows the right one."),
    "internal": (
        "internal error",
        "This is a mistake in tensorserve: please report it. If it came while loading, "
        "TENSORSERVE_LOADER=reference may load the model meanwhile.",
    ),
    "out_of_memory": (
        "out of memory",
        "The kernel ended a process of the engine. Raise the container's memory limit.",
    ),
    "engine": ("the engine ended", "Its own output, in the log of the container, says why."),
}
CAUTIONS = {
    "digests": "No authenticated manifest: the weights are held to the digests in their own file, "
    "and nothing vouches for configuration and tokenizer. `tensorserve sign` mends it.",
    "tags": "TENSORSERVE_VERIFY=tags: nothing says that each tensor is the one of its name. "
    "`tensorserve sign` mends it.",
}
"""By what vouches for the weights (verification.MODES), where that is less than could be."""
_RETRIES = {
    "reset": "connection reset",
    "short_body": "answer cut short",
    "stall": "no data for too long",
    "dns": "name not found",
    "connect": "no connection",
    "tls": "TLS error",
    "expired": "credentials expired",
}


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


def failed(state: StartState) -> str:
    """Why the start of `state`, which has failed, did so, and its exit code."""
    assert state.failure is not None
    reason = state.failure.reason
    words = FAILURES[reason][0] if reason in FAILURES else reason.replace("_", " ")
    return f"Failed: {words} (exit code{NBSP}{state.failure.exit_code})"


def retry_words(reason: str) -> str:
    """Why requests were sent again, for the label `reason` of a retry."""
    status = reason.removeprefix("status_")
    if status != reason and status.isdigit():
        return f"the source answered {status}"
    return _RETRIES.get(reason, reason.replace("_", " "))
