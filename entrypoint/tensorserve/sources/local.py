"""Files: a path, or file://."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_uri
from tensorserve.sources.base import FetchObserver, NotFoundError, ReplacedError, Unobserved
from tensorserve.sources.parts import Filling, ReadsParts


class LocalSource(ReadsParts):
    """One file. Its identity is checked at every read: a file that changes is not a version."""

    remote = False
    pinned = True

    def __init__(self, path: Path, observer: FetchObserver | None = None) -> None:
        self.name = str(path)
        self._observer = observer or Unobserved()
        try:
            # O_NONBLOCK: opening a pipe would wait for its writer. Files know no such waiting.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{path} does not exist.", hint="Is the volume mounted?") from error
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
                hint="Give the directory of the bundle, or the .tensors file itself.",
            )
        self.size = info.st_size
        self.version: str | None = _identity(info)

    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """See `Source`. Raises ReplacedError if the file changed or is too short."""
        filling = Filling(lengths, memory, on_part)
        self.within(offset, filling)
        self._observer.request()
        while not filling.finished:
            wanted = filling.wanted
            try:
                count = os.preadv(self._fd, [wanted], offset + filling.done)
            except OSError as error:
                raise SourceUnavailableError(f"{self.name}: {error.strerror}.") from error
            if not count:
                raise ReplacedError(
                    f"{self.name} ends at byte {offset + filling.done}; {self.size} were there at "
                    "first.",
                    hint="The file was truncated while it was read. Start again.",
                )
            self._observer.received(count)
            # Before the part is used: a change that came before it was read is seen here.
            if count == len(wanted) and _identity(os.fstat(self._fd)) != self.version:
                raise ReplacedError(
                    f"{self.name} was changed while it was read.",
                    hint="Start again; put new models under a new name instead of over an old one.",
                )
            filling.add(count)

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def local_path(uri: str) -> Path:
    """The path that `uri` (a path, or file:///...) means. Raises ConfigurationError."""
    if not uri.startswith("file://"):
        return Path(uri)
    # Not urlsplit: "?" and "#" are ordinary characters in a file's name.
    path = uri.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise ConfigurationError(
            f"{redact_uri(uri)} names a file on another host.",
            hint="Three slashes make an absolute path: file:///models/my-model.",
        )
    return Path(unquote(path))


def list_directory(root: Path) -> dict[str, int]:
    """{relative name: bytes} of the files below `root`. Links that lead out of it are refused.

    Raises NotFoundError, CorruptError (such a link) or PermissionDeniedError.
    """
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory.", hint="Is the volume mounted?")
    real_root = root.resolve()
    found: dict[str, int] = {}
    for directory, directories, files in os.walk(root, onerror=_cannot_list):
        for name in [*directories, *files]:
            path = Path(directory, name)
            # A volume of a Kubernetes secret or config map is made of links inside itself.
            if not path.resolve().is_relative_to(real_root):
                raise CorruptError(
                    f"{path} is a link that leads out of the bundle.", hint="Copy the file instead."
                )
            if path.is_file():
                found[str(path.relative_to(root))] = path.stat().st_size
    return found


def _cannot_list(error: OSError) -> None:
    """What os.walk would pass over in silence: a file not seen now is a puzzle later."""
    if isinstance(error, PermissionError):
        raise _unreadable(error.filename) from error
    raise SourceUnavailableError(f"{error.filename}: {error.strerror}.") from error


def _unreadable(path: Path | str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{path} cannot be read by user {os.getuid()}.",
        hint="Give the container's user read access (chmod o+r, or a matching group).",
    )


def _identity(info: os.stat_result) -> str:
    # The time of the last write can be set back (`cp -p`, `rsync -t --inplace`); that of the last
    # change of the inode cannot.
    times = f"{info.st_mtime_ns}-{info.st_ctime_ns}"
    return f"{times}-{info.st_size}-{info.st_dev}-{info.st_ino}"
