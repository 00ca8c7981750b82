"""When is a request retried, after which delay, and when does it fail?"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from tensorserve.errors import SourceUnavailableError
from tensorserve.sources.base import FetchObserver, RetryPolicy
from tensorserve.sources.tuning import DEFAULTS

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
"""Statuses of an HTTP answer after which the same request is sent again."""


_log = logging.getLogger("tensorserve.sources")


class TryAgain(Exception):
    """One attempt failed with a transient error; `reason` is a metric label.

    `after`: seconds to wait before the next attempt; None: the policy decides.
    """

    def __init__(self, reason: str, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.after = after


class Attempts:
    """The attempts at one range: counts them, waits between them and limits them."""

    def __init__(self, policy: RetryPolicy, observer: FetchObserver, name: str) -> None:
        self._policy = policy
        self._observer = observer
        self._name = name
        self._failures = 0
        self._bytes = 0
        self._renewed = False
        self._progress_at = time.monotonic()

    def progressed(self, count: int) -> None:
        """`count` bytes arrived. Resets the deadline if their average rate is high enough.

        The rate is measured since the last reset, pauses included. Otherwise a source that gives a
        few bytes to each connection would never fail.
        """
        self._bytes += count
        if self._bytes >= self._policy.minimum_rate * (time.monotonic() - self._progress_at):
            self._failures = 0
            self._bytes = 0
            self._renewed = False
            self._progress_at = time.monotonic()

    def may_renew(self) -> bool:
        """Whether credentials may be renewed: once until there is progress again."""
        if self._renewed:
            return False
        self._renewed = True
        return True

    def failed(self, cause: TryAgain) -> None:
        """Waits before the next attempt. Raises SourceUnavailableError if there is none left."""
        self._failures += 1
        waited = time.monotonic() - self._progress_at
        policy = self._policy
        left = policy.deadline - waited
        enough = policy.attempts is not None and self._failures >= policy.attempts
        # If Retry-After exceeds the time left, waiting is useless: the server will not answer
        # before.
        if enough or left <= 0 or (cause.after or 0) > left:
            raise SourceUnavailableError(
                f"{self._name}: {cause.message} "
                f"({self._failures} attempts in {waited:.0f} s without progress).",
                hint="Check that the source is reachable from here, then start again. "
                "TENSORSERVE_FETCH_DEADLINE sets the seconds without progress.",
            ) from cause
        self._observer.retry(cause.reason)
        if waited >= DEFAULTS.told_after and _turns.take():
            _log.warning(
                "tensorserve: waiting for %s: %s; asked again until there was no progress for "
                "%.0f s (TENSORSERVE_FETCH_DEADLINE).",
                self._name,
                cause.message,
                policy.deadline,
            )
        # The pause is shortened, so that the last attempt is at the deadline.
        time.sleep(min(self._pause(cause.after), left))

    def _pause(self, asked: float | None) -> float:
        backoff = full_jitter(self._failures, self._policy)
        if asked is None:
            return backoff
        # A server that keeps sending `Retry-After: 0` gets the back-off all the same.
        return asked if self._failures <= DEFAULTS.unpaused_failures else max(asked, backoff)


class _Turns:
    """Not each of many requests that wait for one server says so, and none too often."""

    def __init__(self) -> None:
        self._next = 0.0

    def take(self) -> bool:
        """Whether it is time to say so again."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + DEFAULTS.told_every
        return True


_turns = _Turns()


def full_jitter(failures: int, policy: RetryPolicy) -> float:
    """Seconds to wait: uniform in [0, min(cap, base × 2^failures)].

    "Full jitter" in AWS's Exponential Backoff And Jitter (2015), the least load for the server.
    """
    return random.uniform(
        0, min(policy.backoff_cap, policy.backoff_base * 2.0 ** min(failures, 32))
    )


def transient(status: int, headers: Mapping[str, str]) -> TryAgain:
    """For an answer with one of the statuses TRANSIENT."""
    return TryAgain(
        f"status_{status}",
        f"the server answers {status}",
        after=retry_after(headers.get("Retry-After")),
    )


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """Seconds in a Retry-After header (a number, or an HTTP date), capped; None if invalid."""
    if not value:
        return None
    if value.strip().isdecimal():
        return min(float(value), DEFAULTS.most_retry_after)
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return min(max(0.0, moment - (time.time() if now is None else now)), DEFAULTS.most_retry_after)
