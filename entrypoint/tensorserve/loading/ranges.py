"""How are adjacent ranges of bytes joined?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The (start, stop) ranges, in the order given, with those that touch made one."""
    before: tuple[int, int] | None = None
    for start, stop in ranges:
        if before is not None and before[1] == start:
            before = before[0], stop
            continue
        if before is not None:
            yield before
        before = start, stop
    if before is not None:
        yield before
