"""When is what is on its way late? After half a second, and three times what is usual."""

from __future__ import annotations

LATE_SECONDS = 0.5
# Without it, the last pieces of a slow link would all be asked for twice.
_TIMES = 3.0
# How much the latest says of what is usual.
_WEIGHT = 0.1


def late_after(usual: float, least: float = LATE_SECONDS) -> float:
    """Seconds, where `usual` ones are usual."""
    return max(least, _TIMES * usual)


def usual_with(usual: float, seconds: float) -> float:
    """What is usual, now that one more has taken `seconds`."""
    return usual + _WEIGHT * (seconds - usual)
