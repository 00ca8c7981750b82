"""How are the spans of a job written down? Those of a large tensor as one run, made when asked for.

A job of 64 MiB has 64 spans, of which nobody looks at most: C receives them (span_table.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

Target = TypeVar("Target")


@dataclass(frozen=True, slots=True)
class Piece(Generic[Target]):
    """Bytes [`start`, `start` + `length`) of a tensor's data, or of its header."""

    target: Target
    start: int
    length: int
    header: bool


@dataclass(eq=False, slots=True)
class Span(Generic[Target]):
    """Bytes of the file that are received at once. `pieces` is empty for gaps between tensors."""

    offset: int
    length: int
    pieces: list[Piece[Target]]
    small: bool
    """Whether more small pieces may join it."""
    taken: bool = False
    """Whether some thread assembles it or has done so: it may be received twice."""
    placed_by: int | None = None
    """The thread that receives it in its tensor's memory: two must not write there."""
    claim: Callable[[], bool] | None = None
    """Takes it for the copy that the caller has, where C assembles it; False: it is taken."""

    @property
    def data_bytes(self) -> int:
        """Of tensors, without headers."""
        return sum(piece.length for piece in self.pieces if not piece.header)

    @property
    def end(self) -> int:
        """The offset in the file behind it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Run(Generic[Target]):
    """Bytes [`start`, `stop`) of one tensor's data, as spans that end at multiples of `size`."""

    offset: int
    """In the file."""
    target: Target
    start: int
    stop: int
    size: int

    @property
    def count(self) -> int:
        """Of its spans."""
        return -(-self.stop // self.size) - self.start // self.size

    @property
    def end(self) -> int:
        """The offset in the file behind it."""
        return self.offset + self.stop - self.start

    def begin(self, number: int) -> int:
        """The first of the tensor's bytes in span `number` of the run; `stop` behind the last."""
        if not number:
            return self.start
        return min((self.start // self.size + number) * self.size, self.stop)

    def cut(self, first: int, stop: int) -> Run[Target]:
        """Its spans [`first`, `stop`)."""
        start, end = self.begin(first), self.begin(stop)
        return Run(self.offset + start - self.start, self.target, start, end, self.size)

    def span(self, number: int) -> Span[Target]:
        """Span `number` of the run."""
        start, end = self.begin(number), self.begin(number + 1)
        piece = Piece(self.target, start, end - start, header=False)
        return Span(self.offset + start - self.start, end - start, [piece], small=False)


class Spans(Sequence[Span[Target]]):
    """Adjacent spans, in file order. A span of a run is made once."""

    def __init__(self) -> None:
        self._parts: list[Span[Target] | Run[Target]] = []
        self._first: list[int] = []
        """Of each part: the number of its first span."""
        self._count = 0
        self._made: dict[int, Span[Target]] = {}

    def add(self, part: Span[Target] | Run[Target]) -> None:
        """At the end."""
        self._parts.append(part)
        self._first.append(self._count)
        self._count += part.count if isinstance(part, Run) else 1

    @property
    def last(self) -> Span[Target] | Run[Target]:
        """The last part. Raises IndexError where there is none."""
        return self._parts[-1]

    def offset(self, number: int) -> int:
        """Of span `number`, in the file."""
        at = bisect_right(self._first, number) - 1
        part = self._parts[at]
        if isinstance(part, Span):
            return part.offset
        return part.offset + part.begin(number - self._first[at]) - part.start

    def parts(self, first: int, stop: int) -> Iterator[tuple[int, Span[Target] | Run[Target]]]:
        """(number of its first span, part) of spans [`first`, `stop`), runs cut to these."""
        for number, part in zip(self._first, self._parts, strict=True):
            if isinstance(part, Span):
                if first <= number < stop:
                    yield number, part
            elif number < stop and first < number + part.count:
                begin, end = max(first - number, 0), min(stop - number, part.count)
                whole = not begin and end == part.count
                yield number + begin, part if whole else part.cut(begin, end)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Span[Target]: ...
    @overload
    def __getitem__(self, number: slice) -> list[Span[Target]]: ...
    def __getitem__(self, number: int | slice) -> Span[Target] | list[Span[Target]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(self._count))]
        if not -self._count <= number < self._count:
            raise IndexError(number)
        number %= self._count
        at = bisect_right(self._first, number) - 1
        part = self._parts[at]
        if isinstance(part, Span):
            return part
        # Two threads that ask for the same one get the same one.
        found = self._made.get(number)
        if found is None:
            found = self._made.setdefault(number, part.span(number - self._first[at]))
        return found
