"""Which container and which blob does an az:// URI name?"""

from __future__ import annotations

import re

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri

# https://learn.microsoft.com/rest/api/storageservices/naming-and-referencing-containers--blobs--and-metadata
_CONTAINER = re.compile(r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]|\$root|\$web")


def split_az(uri: str) -> tuple[str, str]:
    """(container, blob) of az://container/blob; the account is a setting, not in the URI.

    Raises ConfigurationError for an invalid container.
    """
    container, _, name = uri.removeprefix("az://").partition("/")
    if not _CONTAINER.fullmatch(container):
        raise ConfigurationError(
            f"{redact_uri(f'az://{container}')}: that is not the name of a container.",
            hint="Use az://container/prefix: small letters, digits and single hyphens. The storage "
            "account goes into AZURE_STORAGE_ACCOUNT, credentials into variables of their own "
            "(docs/clouds.md).",
        )
    return container, name
