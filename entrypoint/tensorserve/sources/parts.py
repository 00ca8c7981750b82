"""How far is a read of neighbouring parts: which memory is filled next, and who is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from tensorserve.errors import CorruptError


def go_on(_part: int) -> bool:
    """For reads that nobody needs to hear of, part by part."""
    return True


class Filling:
    """Parts that are filled in order: `memory(i)` is asked for when part i begins, and `on_part(i)`
    is called when it is full. Where that returns False, the rest is not wanted any more.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool] = go_on,
    ) -> None:
        self._lengths = lengths
        self._memory = memory
        self._on_part = on_part
        self._part = 0
        self._rest: memoryview | None = None  # of this part's memory
        self.length = sum(lengths)
        self.done = 0
        self._unwanted = False
        self._skip_empty()

    @classmethod
    def of(cls, buffer: memoryview) -> Filling:
        """One part, and its memory is `buffer`."""
        return cls([len(buffer)], lambda _: buffer)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be read."""
        return self._unwanted or self._part == len(self._lengths)

    @property
    def wanted(self) -> memoryview:
        """Where the next bytes belong. May wait for memory."""
        if self._rest is None:
            self._rest = self._memory(self._part)
        return self._rest

    def ends_with(self, count: int) -> bool:
        """Whether `count` more bytes are the last ones."""
        return self.done + count == self.length

    def add(self, count: int) -> None:
        """`count` bytes were written to `wanted`."""
        self.done += count
        self._rest = self.wanted[count:]
        if not len(self._rest):
            self._next()
            self._skip_empty()

    def take(self, data: bytes) -> None:
        """Copy from `data`, which holds all of it."""
        view = memoryview(data)
        while not self.finished:
            wanted = self.wanted
            wanted[:] = view[: len(wanted)]
            view = view[len(wanted) :]
            self.add(len(wanted))

    def _next(self) -> None:
        if not self._on_part(self._part):
            self._unwanted = True
        self._part += 1
        self._rest = None

    def _skip_empty(self) -> None:
        while not self.finished and not self._lengths[self._part]:
            self._next()


class ReadsParts(ABC):
    """A `Source` whose reads are all made of `read_parts`."""

    name: str
    size: int
    pinned: bool

    @abstractmethod
    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """See `Source`."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` wholly from `offset`, or raise one of our errors."""
        self.read_parts(offset, [len(buffer)], lambda _: buffer, go_on)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """See `Source`."""
        self.read_into(offset, buffer)

    def hurry(self, thread: int) -> None:  # noqa: B027 - nothing to do is right for most
        """There is no other way."""

    def passed(self, offset: int) -> None:  # noqa: B027
        """Nothing is kept here that could go."""

    def within(self, offset: int, filling: Filling) -> int:
        """Where `filling` from `offset` on ends. Raises CorruptError beyond the object's end."""
        stop = offset + filling.length
        if offset < 0 or stop > self.size:
            raise CorruptError(
                f"{self.name}: bytes {offset} to {stop} are beyond its end ({self.size} bytes)."
            )
        return stop
