"""Why is an adapter not served, what is counted, and what is the client told?"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from tensorserve.bundle.adapter_identity import ADAPTER_NAME
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.sources import ForbiddenError, NotFoundError

# Values of `reason` beside those of errors (errors.py).
NAME, NOT_ALLOWED, ENGINE = "name", "not_allowed", "engine"
TOO_LARGE, FULL = "too_large", "full"
INTERNAL = TensorserveError.reason
UNKNOWN, UNUSABLE, UNAVAILABLE = 404, 400, 503
"""Status codes of HTTP. vLLM itself answers 404 for a model that does not exist, and 400 for an
adapter that was found and cannot be loaded."""
_WHITE_SPACE = re.compile(r"\s+")


class AdapterRefused(Exception):
    """An adapter is not served. `reason` is a metric's label; `status` one of the above.

    `message` is for the server's log, `said` for the client: it names no place and no key.
    """

    def __init__(self, reason: str, status: int, message: str, said: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.message = message
        self.said = said


def check_name(name: str, allowed: tuple[str, ...]) -> None:
    """Raises AdapterRefused for a name that is not an adapter's, or not one of `allowed`.

    An empty `allowed` allows all. A name has no slash, no percent sign and does not begin with a
    dot, so it cannot leave the store, whatever the store decodes.
    """
    if not ADAPTER_NAME.fullmatch(name):
        raise AdapterRefused(NAME, UNKNOWN, "a name that no adapter has", "It does not exist.")
    if allowed and not any(fnmatchcase(name, pattern) for pattern in allowed):
        raise AdapterRefused(
            NOT_ALLOWED,
            UNKNOWN,
            f"{name} is not in TENSORSERVE_ADAPTERS_ALLOW",
            "It does not exist.",
        )


def refused(error: TensorserveError) -> AdapterRefused:
    """What an error of the store or of the adapter's files means."""
    message = _WHITE_SPACE.sub(" ", str(error))
    if isinstance(error, NotFoundError | ForbiddenError):
        # S3 answers 403 for what does not exist, where the credentials may not list.
        return AdapterRefused(error.reason, UNKNOWN, message, "It does not exist.")
    if isinstance(error, SourceUnavailableError | PermissionDeniedError):
        said = "The store of adapters cannot be reached. Try again later."
        return AdapterRefused(error.reason, UNAVAILABLE, message, said)
    if isinstance(error, CorruptError):
        said = "It was found but could not be loaded: it is damaged, or not authentic."
        return AdapterRefused(error.reason, UNUSABLE, message, said)
    if isinstance(error, ConfigurationError):
        said = "It was found but could not be loaded."
        return AdapterRefused(error.reason, UNUSABLE, message, said)
    return AdapterRefused(error.reason, UNAVAILABLE, message, "It could not be loaded.")
