"""What a source is: something with a size and a version, of which byte ranges can be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tensorserve.errors import CorruptError
from tensorserve.secret import Secret

# More than that never helped.
MOST_CONNECTIONS = 256


class NotFoundError(CorruptError):
    """The object does not exist, although its bucket or server does."""

    reason = "not_found"


class ReplacedError(CorruptError):
    """The object is not the one that it was when it was opened."""


class Source(Protocol):
    """One object, open for reading. Methods may be called by many threads at once."""

    name: str
    """The URI, redacted: fit for messages."""
    size: int
    """Bytes."""
    version: str | None
    """What names this version (an ETag, a file's identity, a date); None if there is nothing."""
    pinned: bool
    """Whether `version` changes with every change of the bytes. A date in seconds does not, a weak
    ETag need not (RFC 9110, 8.8.1): then what two requests give may be of two versions.
    """
    remote: bool
    """Whether requests take time on the way, so that many at once help."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` wholly from `offset`, or raise one of our errors."""

    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """Read neighbouring parts of `lengths` bytes from `offset` on, in one go and in order.

        `memory(i)` is asked for when part i begins, and may wait. `on_part(i)` is called, in this
        thread, as soon as it is full, so that it can be used while the rest is on its way; where it
        returns False, the rest is left unread.
        """

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""

    def read_again(self, offset: int, buffer: memoryview) -> None:
        """As `read_into`, of bytes that came damaged: from where they stand, not from a memory."""

    def hurry(self, thread: int) -> None:
        """What `thread` (its ident) waits for is late, and should be asked for in another way."""

    def passed(self, offset: int) -> None:
        """Nothing before `offset` is needed any more, unless it turns out to be damaged."""

    def close(self) -> None:
        """Free connections and descriptors."""


class FetchObserver(Protocol):
    """Told what the transport does. Called from many threads; must be cheap."""

    def request(self) -> None:
        """A request was sent."""

    def retry(self, reason: str) -> None:
        """A request is sent again; `reason` is a short label ("reset", "stall", "status_503")."""

    def received(self, count: int) -> None:
        """Payload bytes arrived."""


class Unobserved:
    """The observer of those who do not care."""

    def request(self) -> None: ...
    def retry(self, reason: str) -> None: ...
    def received(self, count: int) -> None: ...


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again, and when to give up. Times in seconds, rates in bytes per second."""

    attempts: int | None = None
    """In a row without any progress; None: as many as the deadline leaves time for."""
    deadline: float = 300.0
    """Without any progress of one range."""
    connect_timeout: float = 5.0
    stall_timeout: float = 10.0
    """Without a byte."""
    minimum_rate: float = 32 * 1024
    """Averaged over `stall_timeout`: less is as good as nothing."""
    backoff_base: float = 0.1
    backoff_cap: float = 10.0


@dataclass(frozen=True)
class S3Access:
    """How S3 is reached. Without keys, botocore's credential chain is asked."""

    endpoint_url: str | None = None
    region: str | None = None
    ca_bundle: str | None = None
    addressing_style: str = "auto"
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    session_token: Secret | None = None


@dataclass(frozen=True)
class Access:
    """How sources are reached, whatever their kind."""

    s3: S3Access = field(default_factory=S3Access)
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    allowed_hosts: frozenset[str] = frozenset()
    """Link-local or metadata hosts that are allowed all the same."""
    connections: int = MOST_CONNECTIONS
    """That are kept open for the next request."""
