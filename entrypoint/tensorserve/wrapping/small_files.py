"""How is a small file with a wrapping key or a token read, so that errors name it?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

_MOST_BYTES = 64 * 1024


def read_small(path: str, what: str) -> Secret:
    """The content of the file `path`, which is `what` in errors.

    Raises ConfigurationError if it cannot be read or has more than 64 KiB.
    """
    if not path.startswith("/"):
        raise ConfigurationError(
            f"{what} {path!r} is not an absolute path.",
            hint="For example /run/secrets/wrapping-key.",
        )
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        said = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise ConfigurationError(
            f"{what} {path} cannot be read: {said}.",
            hint=f"Mount it there, readable by this user ({os.getuid()}:{os.getgid()}).",
        ) from error
    if len(data) > _MOST_BYTES:
        raise ConfigurationError(
            f"{what} {path} is larger than 64 KiB.", hint="Is it the right file?"
        )
    return Secret(data, path)
