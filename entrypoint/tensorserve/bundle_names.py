"""Which names may the files of a bundle have?"""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import unquote

_LONGEST = 1024  # a key's length in S3


def leaves_bundle(name: str) -> bool:
    """Whether `name` is none, or could lead out of the bundle's directory.

    Also as it would be after decoding, however often: a proxy in front of a web server may decode
    `%2e%2e` before the server does.
    """
    if len(name.encode(errors="replace")) > _LONGEST:
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
        # A line break in a name could forge a line of a log.
        or any(ord(character) < 32 or ord(character) == 127 for character in name)
        or any(0xD800 <= ord(character) <= 0xDFFF for character in name)  # bytes, not UTF-8
        or PurePosixPath(name).is_absolute()
        or any(part in {"", ".", ".."} for part in name.split("/"))
    )
