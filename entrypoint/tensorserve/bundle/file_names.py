"""Which names may the files of a bundle have?"""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import unquote

_MAX_BYTES = 1024  # the limit of S3 for a key


def leaves_bundle(name: str) -> bool:
    """Whether `name` is invalid or could leave the bundle's directory.

    Every percent-decoded form is checked as well: a proxy may decode `%2e%2e` before the web
    server does.
    """
    if len(name.encode(errors="replace")) > _MAX_BYTES:
        return True
    while not _is_bad(name):
        decoded = unquote(name)
        if decoded == name:
            return False
        name = decoded
    return True


def _is_bad(name: str) -> bool:
    return (
        not name
        or "\\" in name
        # A line break in a name could forge a log line.
        or any(ord(character) < 32 or ord(character) == 127 for character in name)
        or any(0xD800 <= ord(character) <= 0xDFFF for character in name)  # not valid UTF-8
        or PurePosixPath(name).is_absolute()
        or any(part in {"", ".", ".."} for part in name.split("/"))
    )
