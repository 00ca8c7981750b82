"""Which bucket and which object does a gs:// URI name?"""

from __future__ import annotations

import re

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri

# https://cloud.google.com/storage/docs/buckets#naming; a name with dots may have 222 characters.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


def split_gs(uri: str) -> tuple[str, str]:
    """(bucket, object) of gs://bucket/object. Raises ConfigurationError for an invalid bucket."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigurationError(
            f"{redact_uri(f'gs://{bucket}')}: that is not the name of a bucket.",
            hint="Use gs://bucket/prefix: small letters, digits, dots, hyphens and underscores. "
            "Credentials are Google's Application Default Credentials (docs/clouds.md).",
        )
    return bucket, name
