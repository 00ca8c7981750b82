"""How are files (a path, or file://) read and listed?"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_uri
from tensorserve.sources.base import (
    Access,
    FetchObserver,
    NotFoundError,
    ReplacedError,
    Source,
    Unobserved,
)
from tensorserve.sources.scatter_read import Filling

_LOST_AND_FOUND = "lost+found"


class LocalSource(Source):
    """One file. Its identity is checked at every read: a file that changes is not a version."""

    remote = False
    pinned = True

    def __init__(self, path: Path, observer: FetchObserver | None = None) -> None:
        self.name = str(path)
        self._observer = observer or Unobserved()
        try:
            # O_NONBLOCK: opening a pipe would wait for its writer. It has no effect on files.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"{path} does not exist.", hint="Check the path, and that the volume is mounted."
            ) from error
        except PermissionError as error:
            raise _unreadable(path) from error
        except OSError as error:
            raise SourceUnavailableError(f"{path}: {error.strerror}.") from error
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(self._fd)
            what = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
            raise NotFoundError(
                f"{path} is {what}, a file was expected.",
                hint="Give the bundle's directory, or the .tensors file itself.",
            )
        self.size = info.st_size
        self.version: str | None = file_identity(info)

    def read_parts(self, offset: int, parts: Filling) -> None:
        """See `Source`. Raises ReplacedError if the file changed or is too short."""
        self.end_of(offset, parts)
        self._observer.request()
        while not parts.finished:
            wanted = parts.wanted
            try:
                count = os.preadv(self._fd, [wanted], offset + parts.done)
            except OSError as error:
                raise SourceUnavailableError(f"{self.name}: {error.strerror}.") from error
            if not count:
                raise ReplacedError(
                    f"{self.name} ends at byte {offset + parts.done}; {self.size} were there at "
                    "first.",
                    hint="The file was truncated while it was read. Start again.",
                )
            self._observer.received(count)
            # Checked before the part is used, so that a change before its read is found.
            if count == len(wanted) and file_identity(os.fstat(self._fd)) != self.version:
                raise ReplacedError(
                    f"{self.name} was changed while it was read.",
                    hint="Start again; put new models under a new name instead of over an old one.",
                )
            parts.add(count)

    def close(self) -> None:
        """Closes the descriptor. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def local_path(uri: str) -> Path:
    """The path of `uri` (a path, or file:///...). Raises ConfigurationError for another host."""
    if not uri.startswith("file://"):
        return Path(uri)
    # Not urlsplit: "?" and "#" are ordinary characters in a file's name.
    path = uri.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise ConfigurationError(
            f"{redact_uri(uri)} names a file on another host.",
            hint="Use three slashes for an absolute path: file:///models/my-model.",
        )
    return Path(unquote(path))


def open_object(uri: str, _access: Access, observer: FetchObserver | None) -> Source:
    """Opens a path or file:// URI. Raises the sources' errors."""
    return LocalSource(local_path(uri), observer)


def list_objects(uri: str, _access: Access) -> dict[str, int]:
    """See `sources.list_names`."""
    return list_directory(local_path(uri))


def list_directory(root: Path) -> dict[str, int]:
    """{relative name: size in bytes} of the files below `root`.

    Raises NotFoundError, CorruptError for a link that leads out of `root`, PermissionDeniedError or
    SourceUnavailableError.
    """
    found: dict[str, int] = {}
    try:
        if not root.is_dir():
            raise NotFoundError(
                f"{root} is not a directory.",
                hint="Check the path, and that the volume is mounted.",
            )
        real_root = os.path.realpath(root)
        for directory, directories, files in os.walk(root, onerror=_cannot_list):
            if directory == str(root) and _is_unreadable_lost_and_found(root / _LOST_AND_FOUND):
                directories.remove(_LOST_AND_FOUND)
            for name in [*directories, *files]:
                path = Path(directory, name)
                # Links inside the directory are allowed: a Kubernetes secret or config map has
                # them. Not Path.resolve, which raises RuntimeError for a link to itself.
                if not Path(os.path.realpath(path)).is_relative_to(real_root):
                    raise CorruptError(
                        f"{path} is a link that leads out of the bundle.",
                        hint="Copy the file instead.",
                    )
                if path.is_file():
                    found[str(path.relative_to(root))] = path.stat().st_size
    except OSError as error:
        _cannot_list(error)
    return found


def _is_unreadable_lost_and_found(path: Path) -> bool:
    """An ext4 volume has it at its root, for its own files; only root can read it."""
    return path.is_dir() and not os.access(path, os.R_OK | os.X_OK)


def _cannot_list(error: OSError) -> None:
    """Raises errors that os.walk ignores by default, so that no file is silently missing."""
    if isinstance(error, PermissionError):
        raise _unreadable(error.filename) from error
    raise SourceUnavailableError(f"{error.filename}: {error.strerror}.") from error


def _unreadable(path: Path | str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{path} cannot be read by user {os.geteuid()}.",
        hint="Give the container's user read access (chmod o+r, or a matching group).",
    )


def file_identity(info: os.stat_result) -> str:
    """What names a version of a file: another content has another one."""
    # mtime can be set back (`cp -p`, `rsync -t --inplace`); ctime cannot.
    times = f"{info.st_mtime_ns}-{info.st_ctime_ns}"
    return f"{times}-{info.st_size}-{info.st_dev}-{info.st_ino}"
