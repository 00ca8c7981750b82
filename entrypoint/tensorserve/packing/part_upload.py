"""How is a stream of bytes uploaded as one object in parts, without a copy on disk?

One part is filled while others are being sent. The object is invisible until `finish`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tensorserve.errors import SourceUnavailableError

# Sending 16 MiB takes much longer than a request's latency.
PART_BYTES = 16 * 1024**2


def no_version(name: str) -> SourceUnavailableError:
    """The error for an object whose version the store does not tell: a condition that is empty
    would be none."""
    return SourceUnavailableError(
        f"{name}: the answer has no ETag or generation, so that nothing can be written on "
        "condition that it is still this version.",
        hint="Ask the store itself, and not through a proxy that removes headers.",
    )


class PartUpload(ABC):
    """An object under construction: `write`, `close`, then `finish` to make it visible, or `abort`.

    Memory: `in_flight` parts and one more, of 16 MiB each where the store allows enough of them.
    """

    in_flight = 3
    last_is_held = False
    """Whether the object becomes visible with its last part, which `finish` sends."""

    def __init__(self, part_bytes: int) -> None:
        self.part_bytes = part_bytes
        self._part = bytearray()
        self._begun = False
        self._sent = 0
        self._parts: list[Any] = []
        self._jobs: deque[Future[Any]] = deque()
        self._pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="tensorserve-upload")

    def write(self, data: bytes | memoryview, /) -> None:
        """Takes all of `data`; waits while `in_flight` parts are being sent."""
        view = memoryview(data)
        while view:
            if len(self._part) == self.part_bytes:
                self._send()
            taken = view[: self.part_bytes - len(self._part)]
            self._part += taken
            view = view[len(taken) :]

    def close(self) -> None:
        """Waits until all parts are stored, still invisible. Raises the sources' errors.

        An object of one part is sent by `finish`.
        """
        if self._begun:
            if self._part and not self.last_is_held:
                self._send()
            while self._jobs:
                self._parts.append(self._jobs.popleft().result())
        self._pool.shutdown()

    def finish(self) -> None:
        """Makes the object visible. Raises the sources' errors; call `abort` after one."""
        if self._begun:
            self._complete(self._parts, self._sent, self._part)
        else:
            self._put_whole(self._part)
        self._begun = False
        self._part = bytearray()

    def abort(self) -> None:
        """Removes everything that was sent, also stored parts, which are invisible but billed."""
        self._pool.shutdown(cancel_futures=True)
        self._part = bytearray()
        if self._begun:
            self._begun = False
            self._cancel()

    def _send(self) -> None:
        if not self._begun:
            self._begin()
            self._begun = True
        while len(self._jobs) >= self.in_flight:
            self._parts.append(self._jobs.popleft().result())
        # A bytearray of its own: it is read again in a retry.
        number, start = len(self._parts) + len(self._jobs) + 1, self._sent
        self._sent += len(self._part)
        self._jobs.append(self._pool.submit(self._put, number, start, self._part))
        self._part = bytearray()

    # What a store does ---------------------------------------------------------------------------

    @abstractmethod
    def _begin(self) -> None:
        """Begins an upload in parts."""

    @abstractmethod
    def _put(self, number: int, start: int, body: bytearray) -> Any:
        """Stores part `number` (from 1), which begins at the object's byte `start`.

        Called by `in_flight` threads. What it returns is given to `_complete`.
        """

    @abstractmethod
    def _complete(self, parts: list[Any], sent: int, last: bytearray) -> None:
        """Makes an object of `parts`, `sent` bytes long, visible; `last` where it was held."""

    @abstractmethod
    def _put_whole(self, body: bytearray) -> None:
        """Stores an object in one request."""

    @abstractmethod
    def _cancel(self) -> None:
        """Removes the parts. Unknown ones are not an error."""


class Store(ABC):
    """A prefix of a bucket, for writing."""

    @abstractmethod
    def upload(self, name: str, size: int) -> PartUpload:
        """An upload of `size` bytes that becomes the object `name` below the prefix."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes an object below the prefix. A missing one is not an error."""

    @abstractmethod
    def version(self, name: str) -> str:
        """What names the version of a small object that is there now. Raises NotFoundError."""

    @abstractmethod
    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Replaces a small object in one request if it still has `version`; whether it had."""
