"""Which numbers set the transport's speed and patience, and where does each come from?

Timeouts, back-off and the lowest rate are in `RetryPolicy` (base.py); of these a user sets the
deadline alone, what HTTP fixes in its own places. "Guess" means that no measurement is kept for a
number.
"""

from __future__ import annotations

from dataclasses import dataclass

_KIB = 1024


@dataclass(frozen=True)
class Tuning:
    """All of them. Sizes are bytes, times are seconds."""

    most_connections: int = 256
    """Connections of one source. At S3's 90 MB/s each they carry 23 GB/s, more than a link of
    100 Gbit/s; more were never faster here.
    """
    head_bytes: int = 64 * _KIB
    """Read when an object is opened: enough for the header and the index's length, and often for a
    whole small file. Guess.
    """
    receive_bytes: int = 256 * _KIB
    """Received in one call: large enough that Python's share of the time is small, small enough
    that the rate of a slow connection (10 MB/s: 25 ms) is seen between two calls. Guess.
    """
    record_bytes: int = 16 * _KIB
    """The same where Python reads over TLS: the longest record (RFC 8446, 5.1)."""
    most_redirects: int = 5
    """Followed one after another. Guess."""
    most_error_bytes: int = 64 * _KIB
    """Read of a document that explains a refusal; S3's have a few hundred bytes."""
    most_answer_bytes: int = 16 * 1024 * _KIB
    """Read of a page of a listing; 1,000 names of 1,024 bytes each are a megabyte. Guess."""
    most_retry_after: float = 60.0
    """A server may ask for a pause, but not for a longer one at a time. Guess."""
    unpaused_failures: int = 3
    """After so many failures in a row a pause is made although the server asked for none. Guess."""
    told_after: float = 3.0
    """After so long without progress the log says what is waited for. Guess."""
    told_every: float = 30.0
    """And that again, at most so often in a process. Guess."""


DEFAULTS = Tuning()
