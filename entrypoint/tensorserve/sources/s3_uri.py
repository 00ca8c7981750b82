"""Which bucket and which key does an s3:// URI name?"""

from __future__ import annotations

import re

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri

# All names that S3 has ever allowed, or that S3-compatible servers allow. botocore refuses others.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
# The ARN of an access point; a multi-region access point has no region in its ARN.
_ACCESS_POINT = re.compile(
    r"(arn:[a-z-]{1,20}:s3(?:-outposts|-object-lambda)?:[a-z0-9-]{0,30}:\d{12}:"
    r"(?:accesspoint|outpost/[a-z0-9-]{1,63}/accesspoint)/[A-Za-z0-9.-]{1,63})(?:/(.*))?",
    re.DOTALL,
)


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key. An access point's ARN counts as a bucket.

    Raises ConfigurationError for an invalid bucket name.
    """
    # Not urlsplit: "?" and "#" are ordinary characters in a key.
    found = _ACCESS_POINT.fullmatch(uri.removeprefix("s3://"))
    if found:
        return found[1], found[2] or ""
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
