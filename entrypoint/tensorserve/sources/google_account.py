"""Which credentials do requests to Google's services carry? google-auth finds and renews them.

Application Default Credentials: the file of GOOGLE_APPLICATION_CREDENTIALS (a service account's
key, a workload identity federation), gcloud's own, or the machine's metadata server. google-auth
asks that server itself: the SSRF guard is for the addresses of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tensorserve.errors import ConfigurationError, PermissionDeniedError
from tensorserve.sources.cloud_account import CloudAccount, said
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.retry import TryAgain

_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_HINT = (
    f"Set {_FILE} to a service account's key or a federation's file, run `gcloud auth "
    "application-default login`, or give the machine a service account."
)


class GoogleAccount(CloudAccount):
    """google-auth's credentials for one scope. Thread-safe."""

    def __init__(self, scope: str, needed_by: str, without: str = "") -> None:
        """`needed_by` names who needs them, `without` what needs none, for messages."""
        super().__init__()
        hold_back()
        self._scope, self._needed_by, self._without = scope, needed_by, without
        self._credentials: Any = None

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`: with a bearer token, and the project that pays if set."""
        del method, url, length
        found = dict(headers)
        with self.lock, self._explained():
            if self._credentials is None:
                self._credentials = self._find()
            if not self._credentials.valid:
                self._credentials.refresh(self._request())
            # Google's own name for the header is in small letters.
            self._credentials.apply(found)
        return found

    def _renewed(self) -> bool:
        if self._credentials is None:
            return False
        with self._explained():
            before = self._credentials.token
            fresh = self._find()  # the file may have been replaced
            fresh.refresh(self._request())
            if fresh.token == before:
                return False
            self._credentials = fresh
            return True

    def _find(self) -> Any:
        try:
            import google.auth
        except ImportError as error:
            raise self._missing_library() from error
        found, _project = google.auth.default(scopes=[self._scope])
        return found

    def _request(self) -> Any:
        """google-auth's transport. A new one each time: a connection must not outlive a fork."""
        try:
            from google.auth.transport.requests import Request
        except ImportError as error:
            raise self._missing_library() from error
        return Request()

    def _missing_library(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._needed_by} needs google-auth, which is not installed here.",
            hint=f"Install it: pip install 'tensorserve[gcs]'.{self._without}",
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns google-auth's errors into this package's, as CloudAccount.authorized raises."""
        try:
            yield
        except (ConfigurationError, PermissionDeniedError, TryAgain):
            raise
        except (ValueError, OSError) as error:  # a file that is not what it says
            raise ConfigurationError(
                f"The Google credentials could not be read: {_said(error)}.",
                hint=f"Check {_FILE} and the file that it names.",
            ) from error
        except Exception as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError

        if not isinstance(error, GoogleAuthError):
            return error
        if isinstance(error, TransportError) or error.retryable:
            text = f"Google's token service cannot be reached: {_said(error)}"
            return TryAgain("credentials", text)
        hint = _HINT + self._without
        if isinstance(error, DefaultCredentialsError):
            named = os.environ.get(_FILE)
            if named:
                return ConfigurationError(
                    f"{_FILE}={named} gives no credentials: {_said(error)}.",
                    hint="Mount the file there, readable by this user "
                    f"({os.getuid()}:{os.getgid()}); a key is JSON with a `type`.",
                )
            return PermissionDeniedError("There are no Google credentials.", hint=hint)
        return PermissionDeniedError(
            f"The Google credentials could not be obtained or renewed: {_said(error)}.", hint=hint
        )


def _said(error: Exception) -> str:
    """The first argument alone: RefreshError's second is the whole answer of the server."""
    return said(error.args[0] if error.args else error)
