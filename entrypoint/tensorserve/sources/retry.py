"""When is a range tried again, after how long, and when is it given up? One policy for all."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

from tensorserve.errors import SourceUnavailableError
from tensorserve.sources.base import FetchObserver, RetryPolicy

# A server may ask for patience, but not for more than this at a time.
MAX_RETRY_AFTER = 60.0
# After so many failures in a row, a pause is made although none was asked for.
_UNPAUSED = 3


class TryAgain(Exception):
    """One attempt failed in a way that may pass; `reason` is a metric label."""

    def __init__(self, reason: str, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.after = after


class Attempts:
    """The attempts at one range: counts them, waits between them, ends them."""

    def __init__(self, policy: RetryPolicy, observer: FetchObserver, name: str) -> None:
        self._policy = policy
        self._observer = observer
        self._name = name
        self._failures = 0
        self._bytes = 0
        self._renewed = False
        self._progress_at = time.monotonic()

    def progressed(self, count: int) -> None:
        """`count` bytes arrived. Patience starts anew, unless they only trickle in.

        Measured since patience began, pauses included: else a source that gives a few bytes to
        each connection is never given up.
        """
        self._bytes += count
        if self._bytes >= self._policy.minimum_rate * (time.monotonic() - self._progress_at):
            self._failures = 0
            self._bytes = 0
            self._renewed = False
            self._progress_at = time.monotonic()

    def may_renew(self) -> bool:
        """Whether new credentials are worth a try: once between two bytes of progress."""
        if self._renewed:
            return False
        self._renewed = True
        return True

    def failed(self, cause: TryAgain) -> None:
        """Wait before the next attempt, or raise SourceUnavailableError if there is to be none."""
        self._failures += 1
        waited = time.monotonic() - self._progress_at
        policy = self._policy
        left = policy.deadline - waited
        enough = policy.attempts is not None and self._failures >= policy.attempts
        # What a server asks for is believed: it will not answer sooner.
        if enough or left <= 0 or (cause.after or 0) > left:
            raise SourceUnavailableError(
                f"{self._name}: {cause.message} "
                f"({self._failures} attempts in {waited:.0f} s without progress).",
                hint="Is the source reachable from here? Start again when it is; "
                "TENSORSERVE_FETCH_DEADLINE sets the patience.",
            ) from cause
        self._observer.retry(cause.reason)
        # One attempt more at the very end, rather than none in the last of the pauses.
        time.sleep(min(self._pause(cause.after), left))

    def _pause(self, asked: float | None) -> float:
        backoff = full_jitter(self._failures, self._policy)
        if asked is None:
            return backoff
        # Whoever asks for no pause at all, again and again, is not asked without one for ever.
        return asked if self._failures <= _UNPAUSED else max(asked, backoff)


def full_jitter(failures: int, policy: RetryPolicy) -> float:
    """Seconds to wait: uniform in [0, min(cap, base × 2^failures)].

    "Full jitter" of AWS's Exponential Backoff And Jitter (2015): the least work for the server.
    """
    return random.uniform(
        0, min(policy.backoff_cap, policy.backoff_base * 2.0 ** min(failures, 32))
    )


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header (seconds, or an HTTP date) asks for, capped; else None."""
    if not value:
        return None
    if value.strip().isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return min(max(0.0, moment - (time.time() if now is None else now)), MAX_RETRY_AFTER)
