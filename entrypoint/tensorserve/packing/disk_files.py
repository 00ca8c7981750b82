"""How is a file written to disk so that errors name it and a full disk is found early?"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.linux import fallocate, start_writing

_HINT = "Is the disk full or read-only? Pack to another one, or to s3://, gs:// or az://."

# Bytes after which writeback starts.
_WRITEBACK_BYTES = 64 * 1024**2


class DiskFile:
    """A file whose errors name it. Writeback starts every 64 MiB, not only at the final fsync."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._written = 0

    def write(self, data: bytes | memoryview, /) -> None:
        """Writes all of `data`. Raises ConfigurationError."""
        rest = memoryview(data)
        with explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._written += len(data)
        if self._written >= _WRITEBACK_BYTES:
            self._written = 0
            start_writing(self._file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into a ConfigurationError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} could not be written: {error.strerror or error}.", hint=_HINT
        ) from error


def reserve(descriptor: int, size: int) -> None:
    """Reserves `size` bytes for a file (fallocate), if the file system supports it.

    A full disk is then found before writing, and large files are written twice as fast. Raises
    OSError.
    """
    if not size:
        return
    try:
        fallocate(descriptor, 0, 0, size)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            raise


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable (fsync). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
