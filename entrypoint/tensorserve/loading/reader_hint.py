"""Which errors of a load name the other reader (TENSORSERVE_LOADER=reference) in their hint?"""

from __future__ import annotations

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.sources import NotFoundError, ReplacedError

# Both readers would fail in the same way: they read the same file, with the same key.
_SAME_FOR_BOTH = (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    NotFoundError,
    ReplacedError,
    WrongKeyError,
)
TRY_REFERENCE = (
    "TENSORSERVE_LOADER=reference reads with tensorizer's own reader: try it to tell the loader's "
    "fault from the file's."
)


def load_failure(error: Exception, loader: str) -> TensorserveError:
    """What to raise for `error`, raised by the stream of `loader` (TENSORSERVE_LOADER).

    An exception that is no TensorserveError (a device's error, a mistake in this code) becomes an
    internal error (exit code 70), with the cause in its message. An error that may come from the
    reader itself gets one more line of hint.
    """
    if isinstance(error, TensorserveError):
        failure = error
    else:
        failure = TensorserveError(
            f"The load failed with an error of the loader or of the device "
            f"({type(error).__name__}: {str(error)[:1000]})."
        )
    suspected = isinstance(failure, CorruptError) or type(failure) is TensorserveError
    said = failure.hint is not None and TRY_REFERENCE in failure.hint
    if loader != "reference" and suspected and not said and not isinstance(failure, _SAME_FOR_BOTH):
        failure.hint = "\n  ".join(filter(None, (failure.hint, TRY_REFERENCE)))
    return failure
