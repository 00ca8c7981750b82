"""What can go wrong, as one family: each error carries its exit code, a metric reason and a hint.

The exit codes are part of the public interface (docs/exit-codes.md); they follow BSD's sysexits.h.
"""

from __future__ import annotations

from typing import ClassVar


class TensorserveError(Exception):
    """Base of every error that we raise on purpose.

    ``message`` says what happened and to which thing (already redacted);
    ``hint`` says what to do now. ``reason`` is the value of the metric label
    ``tensorserve_failures_total{reason}``: short, lower case, never user data.
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
    """An artifact is damaged, incomplete, not what it claims, or changed under us (EX_DATAERR)."""

    exit_code = 65
    reason = "corrupt"


class WrongKeyError(CorruptError):
    """The key or passphrase does not open the file (EX_DATAERR)."""

    reason = "wrong_key"


class SourceUnavailableError(TensorserveError):
    """The source could not be reached or read, retries included (EX_UNAVAILABLE)."""

    exit_code = 69
    reason = "source_unavailable"


class PermissionDeniedError(TensorserveError):
    """Credentials are missing, wrong, expired or not sufficient (EX_NOPERM)."""

    exit_code = 77
    reason = "permission"


class OutOfMemoryError(TensorserveError):
    """The kernel ended a process of the engine for lack of memory (128 + SIGKILL)."""

    exit_code = 137
    reason = "out_of_memory"


class ConfigurationError(TensorserveError):
    """The configuration is wrong (EX_CONFIG); ``problems`` holds one message for each mistake."""

    exit_code = 78
    reason = "configuration"

    def __init__(
        self, message: str, *, hint: str | None = None, problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems or (str(self),)
