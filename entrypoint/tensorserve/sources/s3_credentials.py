"""How are AWS credentials found, and what do botocore's errors about them become?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorserve.errors import ConfigurationError, PermissionDeniedError
from tensorserve.secret import redact_text
from tensorserve.sources.retry import TryAgain

_NO_CREDENTIALS_HINT = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or their _FILE forms), a profile, "
    "or give the machine a role. For a public bucket, set TENSORSERVE_S3_UNSIGNED=true."
)


def _no_credentials_hint() -> str:
    """botocore silently ignores a credentials file that it cannot read; this hint names it."""
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    if path and Path(path).exists() and not os.access(path, os.R_OK):
        return (
            f"AWS_SHARED_CREDENTIALS_FILE={path} cannot be read by this user "
            f"({os.getuid()}:{os.getgid()})."
        )
    return _NO_CREDENTIALS_HINT


def passes(error: Exception) -> bool:
    """Whether botocore's `error` is a transport error, which a retry may solve."""
    from botocore.exceptions import ConnectionError, HTTPClientError, SSLError

    # In botocore, a broken connection is an HTTPClientError and a refused one is not.
    in_transport = isinstance(error, HTTPClientError | ConnectionError)
    return in_transport and not isinstance(error, SSLError)


@contextmanager
def provider_errors() -> Iterator[None]:
    """Turns errors of botocore's credential providers into this package's errors.

    Raises TryAgain if a provider cannot be reached, PermissionDeniedError if it refuses,
    ConfigurationError if it is configured wrongly.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:  # ClientError: what STS answers
        if passes(error):
            raise TryAgain(
                "credentials",
                f"the credentials' provider cannot be reached: {redact_text(str(error))}",
            ) from error
        raise PermissionDeniedError(
            f"The AWS credentials could not be obtained or renewed: {redact_text(str(error))}.",
            hint=_NO_CREDENTIALS_HINT,
        ) from error
    except (ValueError, OSError) as error:
        raise _unusable(error) from error


def _unusable(error: ValueError | OSError) -> ConfigurationError:
    """botocore's providers raise Python's own exceptions for a missing token file, and for an
    invalid or forbidden address."""
    return ConfigurationError(
        f"The AWS credentials could not be obtained: {redact_text(str(error)).rstrip('.')}.",
        hint="Check AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_FULL_URI or "
        "_RELATIVE_URI, and the profile's file.",
    )


def find_credentials(session: Any) -> Any:
    """The credentials from a botocore session's chain.

    Raises PermissionDeniedError if there are none, ConfigurationError if they are configured
    wrongly.
    """
    from botocore.exceptions import BotoCoreError

    try:
        found = session.get_credentials()
    except BotoCoreError as error:
        raise PermissionDeniedError(
            f"The AWS credentials could not be obtained: {redact_text(str(error))}.",
            hint=_NO_CREDENTIALS_HINT,
        ) from error
    except (ValueError, OSError) as error:
        raise _unusable(error) from error
    if found is None:
        raise PermissionDeniedError("There are no AWS credentials.", hint=_no_credentials_hint())
    return found
