"""How does one request go out, and who says what becomes of its answer's body?

Two ways do it: libcurl in one call of C (curl_transport.py) and urllib3 (urllib_transport.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from tensorserve.sources.scatter_read import Filling


@dataclass(frozen=True)
class Answer:
    """The status and header of a response. `headers` ignores the case of names."""

    status: int
    headers: Mapping[str, str]


class Verdict(IntEnum):
    """What becomes of a body. The values are those of fetch.c."""

    DROP = 0
    """Not read."""
    TAKE = 1
    """Received into a `Filling`."""
    COLLECT = 2
    """Read as the document that explains a refusal."""


Judge = Callable[[Answer], "tuple[Verdict, Filling | None]"]
"""Called when a header is complete, before the first byte of the body; may raise."""


@dataclass(frozen=True)
class Expected:
    """What the header of a range has to say to be taken without a look at it by Python."""

    content_range: str
    etag: str
    length: int
    filling: Filling


@dataclass(frozen=True)
class Request:
    """One GET. `as_written`: the path is signed, and must not be normalised."""

    url: str
    headers: Mapping[str, str]
    as_written: bool
    judge: Judge
    received: Callable[[int], None]
    """Told how many bytes of a range were received, at the latest when the request is over."""
    expected: Expected | None = None


@dataclass(frozen=True)
class Reply:
    """What came of a request whose body was not taken."""

    answer: Answer | None
    """None: `expected` was met."""
    document: bytes = field(default=b"")
    """What was collected, at most `most_error_bytes`."""


class Transport(Protocol):
    """Sends requests for one source. Thread-safe."""

    name: str
    """Of the way, for log and metrics."""
    library: str
    """The same for people, with versions: its own, and that of what does TLS for it."""
    counts: bool
    """Whether it counts received bytes as they come, so that `received` does not."""

    def get(self, request: Request) -> Reply:
        """Send it, and receive its body as judged.

        Raises TryAgain for what passes, SourceUnavailableError, PermissionDeniedError and
        ConfigurationError for what does not, and what the callbacks raise.
        """

    def hurry(self, thread: int) -> None:
        """End the request that `thread` waits for: it raises TryAgain("slow")."""

    def close(self) -> None:
        """Close all connections."""
