"""How much host memory does a load take of what is there?

What is available is looked at once, before the start; all of the start's processes get the limit
that follows from it. Ranks share it, and what is fetched ahead for them.
"""

from __future__ import annotations

from tensorserve.memory_group import available_bytes
from tensorserve.settings import Settings

_MIB = 1024**2
_GIB = 1024**3
# Of a rank: a ring of 64 slots of 2 MiB, and 6 MiB for each of some 140 connections, which is what
# 100 Gbit/s need at S3's 90 MB/s for each. Beyond that memory only makes more wait.
_RANK_BYTES = _GIB
# The ring, and some 60 connections.
_RANK_LEAST = 512 * _MIB
# For all ranks: as many connections with blocks of 8 MiB, and three times as many that are there.
_FETCHED_BYTES = 4 * _GIB
# What is fetched ahead gets at least that part of the limit, (numerator, denominator).
_FETCHED_PART = 3, 8
# Beyond that a tensor of which a rank takes a slice stays in host memory until then. Below, it is
# one of several that the device has room for. Not measured on a GPU yet.
SLICED_BYTES = 256 * 1024**2
# What a start leaves to others of what is available.
_PART, _LEAST_PART = 4, 2
# Less reads no model (`TENSORSERVE_HOST_MEMORY_LIMIT` accepts no less).
_LEAST = 64 * _MIB


def automatic_limit(
    available: int | None, ranks: int, *, held: int = 0, fetches: bool = False
) -> int:
    """Bytes of host memory for the loads of all `ranks` of this machine, where the user says none.

    `available`: what there is; None: not known, then what a load makes use of. `held`: bytes of it
    that the model itself will take, where it stays in host memory. `fetches`: whether something is
    fetched ahead, or for all ranks.
    """
    useful = ranks * _RANK_BYTES + fetches * _FETCHED_BYTES
    if available is None:
        return useful
    free = max(0, available - held)
    least = min(free // _LEAST_PART, ranks * _RANK_LEAST)
    return max(_LEAST, min(useful, max(free // _PART, least)))


def limit_of(settings: Settings) -> int:
    """Bytes for all ranks of this machine together: the user's, or what the start worked out.

    Where there was none, as for a single command: worked out now, for one rank.
    """
    if settings.host_memory_limit is not None:
        return settings.host_memory_limit
    return automatic_limit(available_bytes(), 1)


def largest_needs(largest: int, ranks: int, limit: int) -> int:
    """Bytes of host memory for a load of `ranks` that each hold a tensor of `largest` bytes there.

    A rank lets one in alone that is larger than its room, half of its part of `limit`. The other
    half is for connections, and for what is fetched ahead.
    """
    return max(limit, ranks * largest + limit // 2) if largest else 0


def fetched_bytes(limit: int, ranks: int) -> int:
    """Bytes of `limit` that may hold what was fetched ahead, or for all ranks.

    Three eighths, or all that `ranks` make no use of.
    """
    numerator, denominator = _FETCHED_PART
    return max(limit * numerator // denominator, limit - ranks * _RANK_BYTES)
