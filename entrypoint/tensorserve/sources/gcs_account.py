"""Which credentials do requests to Google Cloud Storage carry? google-auth finds and renews them.

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
from tensorserve.sources.base import GcsAccess
from tensorserve.sources.cloud_account import CloudAccount, Shared, said
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.retry import TryAgain

# read_write: `pack` writes. What may be done is decided by roles; scopes only narrow it.
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_HINT = (
    f"Set {_FILE} to a service account's key or a federation's file, run `gcloud auth "
    "application-default login`, or give the machine a service account. For a public bucket, set "
    "TENSORSERVE_GCS_UNSIGNED=true."
)


class GcsAccount(CloudAccount):
    """google-auth's credentials for one GcsAccess. Thread-safe."""

    def __init__(self, access: GcsAccess) -> None:
        super().__init__()
        hold_back()
        self.base = "https://storage.googleapis.com"
        self.unsigned = access.unsigned
        if access.emulator_host is not None:
            # As Google's libraries: an emulator gets no credentials, and needs no scheme.
            host = access.emulator_host.rstrip("/")
            self.base, self.unsigned = host if "://" in host else f"http://{host}", True
        self._credentials: Any = None

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`: with a bearer token, and the project that pays if set."""
        del method, url, length
        found = dict(headers)
        if self.unsigned:
            return found
        with self.lock, provider_errors():
            if self._credentials is None:
                self._credentials = _find()
            if not self._credentials.valid:
                self._credentials.refresh(_request())
            # Google's own name for the header is in small letters.
            self._credentials.apply(found)
        return found

    def _renewed(self) -> bool:
        if self.unsigned or self._credentials is None:
            return False
        with provider_errors():
            before = self._credentials.token
            fresh = _find()  # the file may have been replaced
            fresh.refresh(_request())
            if fresh.token == before:
                return False
            self._credentials = fresh
            return True


def _find() -> Any:
    try:
        import google.auth
    except ImportError as error:
        raise missing_library() from error
    found, _project = google.auth.default(scopes=[_SCOPE])
    return found


def missing_library() -> ConfigurationError:
    """The error where google-auth is not installed."""
    return ConfigurationError(
        "gs:// needs google-auth, which is not installed here.",
        hint="Install it: pip install 'tensorserve[gcs]'. Public buckets need no library: set "
        "TENSORSERVE_GCS_UNSIGNED=true.",
    )


def _request() -> Any:
    """google-auth's transport. A new one each time: a connection must not outlive a fork."""
    try:
        from google.auth.transport.requests import Request
    except ImportError as error:
        raise missing_library() from error
    return Request()


@contextmanager
def provider_errors() -> Iterator[None]:
    """Turns google-auth's errors into this package's, as CloudAccount.authorized raises them."""
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
        raise _explained(error) from error


def _explained(error: Exception) -> Exception:
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError

    if not isinstance(error, GoogleAuthError):
        return error
    if isinstance(error, TransportError) or error.retryable:
        return TryAgain("credentials", f"Google's token service cannot be reached: {_said(error)}")
    if isinstance(error, DefaultCredentialsError):
        named = os.environ.get(_FILE)
        if named:
            return ConfigurationError(
                f"{_FILE}={named} gives no credentials: {_said(error)}.",
                hint="Mount the file there, readable by this user "
                f"({os.getuid()}:{os.getgid()}); a key is JSON with a `type`.",
            )
        return PermissionDeniedError("There are no Google credentials.", hint=_HINT)
    return PermissionDeniedError(
        f"The Google credentials could not be obtained or renewed: {_said(error)}.", hint=_HINT
    )


def _said(error: Exception) -> str:
    """The first argument alone: RefreshError's second is the whole answer of the server."""
    return said(error.args[0] if error.args else error)


account_for = Shared(GcsAccount)
