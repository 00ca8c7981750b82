"""How far is a read of neighbouring parts: which memory is filled next, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Sink(NamedTuple):
    """Addresses of C that takes bytes without the interpreter."""

    take: int
    """int64_t (*)(void *state, const uint8_t *data, int64_t size): how many were wanted."""
    state: int
    finished: int
    """int32_t: not 0 when nothing more is wanted."""


class Filling:
    """Parts that are filled in order: `memory(i)` is asked for when part i begins, and `on_part(i)`
    is called when it is full. Where that returns False, the rest is not wanted any more.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.lengths = lengths
        self.memory = memory
        self.on_part = on_part
        self._part = 0
        self._rest: memoryview | None = None  # of this part's memory
        self._length = sum(lengths)
        self._done = 0
        self._unwanted = False
        self._skip_empty()

    @classmethod
    def of(cls, buffer: memoryview) -> Filling:
        """One part, and its memory is `buffer`."""
        return cls([len(buffer)], lambda _: buffer)

    def rest(self) -> Filling:
        """The parts that are not begun, for another read."""
        first = self._part
        return Filling(
            self.lengths[first:],
            lambda part: self.memory(first + part),
            lambda part: self.on_part(first + part),
        )

    @property
    def length(self) -> int:
        """Bytes of all parts."""
        return self._length

    @property
    def done(self) -> int:
        """Bytes that have come."""
        return self._done

    @property
    def sink(self) -> Sink | None:
        """C that takes the bytes; None where `wanted` and `add` have to be used."""
        return None

    def check(self) -> None:
        """Raise what was raised within `sink`."""

    @property
    def begun(self) -> bool:
        """Whether memory was asked for of a part that is not full yet."""
        return self._rest is not None

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be read."""
        return self._unwanted or self._part == len(self.lengths)

    @property
    def wanted(self) -> memoryview:
        """Where the next bytes belong. May wait for memory."""
        if self._rest is None:
            self._rest = self.memory(self._part)
        return self._rest

    def ends_with(self, count: int) -> bool:
        """Whether `count` more bytes are the last ones."""
        return self._done + count == self._length

    def add(self, count: int) -> None:
        """`count` bytes were written to `wanted`."""
        self._done += count
        self._rest = self.wanted[count:]
        if not len(self._rest):
            self._next()
            self._skip_empty()

    def take(self, data: bytes | memoryview) -> None:
        """Copy from `data`, which holds all of it."""
        view = memoryview(data)
        while not self.finished:
            wanted = self.wanted
            wanted[:] = view[: len(wanted)]
            view = view[len(wanted) :]
            self.add(len(wanted))

    def _next(self) -> None:
        if not self.on_part(self._part):
            self._unwanted = True
        self._part += 1
        self._rest = None

    def _skip_empty(self) -> None:
        while not self.finished and not self.lengths[self._part]:
            self._next()
