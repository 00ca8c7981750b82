"""How is a small file with a secret read, so that errors name it and never its content?"""

from __future__ import annotations

import os
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

MOST_BYTES = 64 * 1024


def read_secret(path: Path | str, named: str, origin: str | None = None) -> Secret:
    """The content of the file `path`, as it is; `origin` is the secret's (default: the path).

    `named` is what errors call the file. Raises ConfigurationError if it cannot be read or has more
    than 64 KiB.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        said = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise ConfigurationError(
            f"{named} cannot be read: {said}.",
            hint=f"Mount it there, readable by this user ({os.getuid()}:{os.getgid()}).",
        ) from error
    if len(data) > MOST_BYTES:
        raise ConfigurationError(f"{named} is larger than 64 KiB.", hint="Is it the right file?")
    return Secret(data, str(path) if origin is None else origin)


def read_absolute(path: str, what: str) -> Secret:
    """The same for a path that a setting names, which must be absolute; errors call it `what`."""
    if not path.startswith("/"):
        raise ConfigurationError(
            f"{what} {path!r} is not an absolute path.",
            hint="For example /run/secrets/wrapping-key.",
        )
    return read_secret(path, f"{what} {path}")
