"""Which errors does this package raise, with which exit code, metric reason and hint?

The exit codes are part of the public interface (docs/exit-codes.md). They follow BSD's sysexits.h.
"""

from __future__ import annotations

import os
from typing import ClassVar


class TensorserveError(Exception):
    """Base class of all errors that this package raises deliberately.

    ``message`` says what is wrong and where (URIs are already redacted); ``hint`` says what to do.
    ``reason`` is the value of the metric label ``tensorserve_failures_total{reason}``: short, lower
    case, never user data.
    """

    exit_code: ClassVar[int] = 70
    reason: ClassVar[str] = "internal"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(TensorserveError):
    """The command line is wrong (EX_USAGE)."""

    exit_code = 64
    reason = "usage"


class CorruptError(TensorserveError):
    """An artifact is damaged, incomplete, not authentic, or changed during a read (EX_DATAERR)."""

    exit_code = 65
    reason = "corrupt"


class WrongKeyError(CorruptError):
    """The key or passphrase does not decrypt the file (EX_DATAERR)."""

    reason = "wrong_key"


class SignatureError(CorruptError):
    """A bundle is not signed, not by an accepted signer, or is not what was signed (EX_DATAERR)."""

    reason = "signature"


class SourceUnavailableError(TensorserveError):
    """The source could not be reached or read, retries included (EX_UNAVAILABLE)."""

    exit_code = 69
    reason = "source_unavailable"


class PermissionDeniedError(TensorserveError):
    """Credentials are missing, wrong, expired or insufficient (EX_NOPERM)."""

    exit_code = 77
    reason = "permission"


class OutOfMemoryError(TensorserveError):
    """The kernel ended a process of the engine for lack of memory (128 + SIGKILL)."""

    exit_code = 137
    reason = "out_of_memory"


class StartStalledError(TensorserveError):
    """The start has made no progress for its deadline (EX_SOFTWARE)."""

    reason = "start_stalled"


class WorkerLostError(TensorserveError):
    """A worker died or failed before the start was ready, and vLLM did not end (EX_SOFTWARE)."""

    reason = "worker_lost"


class OtherRankError(TensorserveError):
    """Another rank of this engine failed or ended, which this one cannot load without.

    Never the cause: the loader does not report it as the start's failure.
    """

    reason = "worker_lost"


class ConfigurationError(TensorserveError):
    """The configuration is wrong (EX_CONFIG); ``problems`` holds one message for each mistake."""

    exit_code = 78
    reason = "configuration"

    def __init__(
        self, message: str, *, hint: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems or (str(self),)


def of_file(error: Exception) -> TensorserveError | None:
    """What the system says of a file, for the user; None for any other error.

    Where a file is expected to be missing or closed, an error says more. This is for all others:
    a path that the user named is no bug.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes):
        return None
    message = f"{os.fsdecode(error.filename)}: {error.strerror}."
    if isinstance(error, PermissionError):
        return PermissionDeniedError(
            message, hint=f"Give user {os.geteuid()} access to it, folders above it included."
        )
    return ConfigurationError(message, hint="Check the path, and that its volume is mounted.")
