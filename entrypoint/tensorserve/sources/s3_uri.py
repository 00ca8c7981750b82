"""Which bucket and which key does an s3:// URI name?"""

from __future__ import annotations

import re

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri

# What S3 has ever allowed, and what servers that speak like it allow (botocore refuses the rest).
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key. ConfigurationError for what cannot be a bucket's name."""
    # Not urlsplit: "?" and "#" are ordinary characters in a key.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigurationError(
            f"{redact_uri(uri)}: no bucket name.", hint="Use s3://bucket/prefix."
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigurationError(
            f"{redact_uri(f's3://{bucket}')}: that is not the name of a bucket.",
            hint="Use s3://bucket/prefix: letters, digits, dots, hyphens and underscores. "
            "Credentials go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    return bucket, key
