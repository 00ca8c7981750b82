"""How far may tensors run ahead of their consumer? Bytes of a memory that are taken, of a limit."""

from __future__ import annotations


class Room:
    """A count of bytes against a limit that the caller names. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._taken = 0

    def fits(self, count: int, limit: int) -> bool:
        """Where nothing is taken any number fits: a single large tensor is let in alone."""
        return not count or not self._taken or self._taken + count <= limit

    def take(self, count: int) -> None:
        """So many bytes more are in use."""
        self._taken += count

    def give_back(self, count: int) -> None:
        """So many bytes are free again."""
        self._taken -= count
