"""How are secrets kept out of the logs of requests: our own and those of libraries?"""

from __future__ import annotations

import logging

# At DEBUG, urllib3 logs URLs with their signatures; botocore logs session tokens and the strings
# that it signs.
_LIBRARIES = (
    "urllib3", "botocore", "boto3", "s3transfer", "google", "azure", "msal", "hvac",
    "tensorserve.requests",
)  # fmt: skip

REQUESTS = logging.getLogger("tensorserve.requests")
"""libcurl's requests, at DEBUG: method, URL and status, as urllib3 logs its own."""


def hold_back() -> None:
    """Sets these loggers to INFO, so that a root logger at DEBUG does not affect them.

    A logger with an explicitly set level keeps it, and so do its child loggers.
    """
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
