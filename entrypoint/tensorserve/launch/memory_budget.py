"""How much of the available host memory may a load take?

Available memory is read once, before the start. All processes of the start get the limit that
follows from it. It covers all ranks of the machine and what is prefetched for them.
"""

from __future__ import annotations

from tensorserve.cgroup_memory import available_bytes
from tensorserve.config.settings import Settings
from tensorserve.loading.tuning import DEFAULTS


def automatic_limit(
    available: int | None, ranks: int, *, held: int = 0, fetches: bool = False
) -> int:
    """Bytes of host memory for the loads of all `ranks` of this machine, where the user sets no
    limit. `available`: free bytes; None: unknown, then the most that a load can use. `held`: bytes
    of it that the model itself will take, where it stays in host memory. `fetches`: whether
    something is fetched ahead, or for all ranks.
    """
    useful = ranks * DEFAULTS.rank_bytes + fetches * DEFAULTS.prefetched_bytes
    if available is None:
        return useful
    free = max(0, available - held)
    least = min(free // DEFAULTS.most_start_part, ranks * DEFAULTS.least_rank_bytes)
    return max(DEFAULTS.least_limit, min(useful, max(free // DEFAULTS.start_part, least)))


def limit_of(settings: Settings) -> int:
    """Bytes for all ranks of this machine together: the user's, or what the start worked out.

    Where there was none, as for a single command: worked out now, for one rank.
    """
    if settings.host_memory_limit is not None:
        return settings.host_memory_limit
    return automatic_limit(available_bytes(), 1)


def largest_needs(largest: int, ranks: int, limit: int) -> int:
    """Bytes of host memory for a load of `ranks` that each hold a tensor of `largest` bytes there.

    A tensor larger than a rank's share, half of its part of `limit`, is loaded alone. The other
    half is for connections and prefetched blocks.
    """
    return max(limit, ranks * largest + limit // 2) if largest else 0


def fetched_bytes(limit: int, ranks: int) -> int:
    """Bytes of `limit` that may hold what was fetched ahead, or for all ranks.

    Three eighths, or all that `ranks` make no use of.
    """
    numerator, denominator = DEFAULTS.prefetched_part
    return max(limit * numerator // denominator, limit - ranks * DEFAULTS.rank_bytes)


def prefetch_budget(settings: Settings, ranks: int) -> int:
    """`fetched_bytes` of the limit that `settings` give."""
    return fetched_bytes(limit_of(settings), ranks)
