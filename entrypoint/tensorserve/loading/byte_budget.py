"""How many bytes are taken by tensors that were admitted and not yet consumed?"""

from __future__ import annotations


class ByteBudget:
    """A count of bytes against a limit that the caller names. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._taken = 0

    def fits(self, count: int, limit: int) -> bool:
        """Whether `count` more bytes fit. Where none are taken any number does, so that a
        single tensor larger than the limit is admitted, alone.
        """
        return not count or not self._taken or self._taken + count <= limit

    def take(self, count: int) -> None:
        """`count` more bytes are in use."""
        self._taken += count

    def give_back(self, count: int) -> None:
        """`count` bytes are free again."""
        self._taken -= count
