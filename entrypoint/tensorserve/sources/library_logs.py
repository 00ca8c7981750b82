"""What may the libraries below the sources log? Not what lets somebody in, unless asked by name."""

from __future__ import annotations

import logging

# At DEBUG, urllib3 writes whole URLs with their signatures, botocore session tokens and the
# strings that it signs.
_LIBRARIES = ("urllib3", "botocore", "boto3", "s3transfer")


def hold_back() -> None:
    """Keep these loggers above DEBUG, whatever the root logger's level is or becomes.

    One whose level somebody has set by name keeps it, and so do loggers below it.
    """
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
