"""What kind of entry is a path in a model's directory, and can it be read?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tensorserve.errors import PermissionDeniedError
from tensorserve.format.safetensors import LFS_POINTER

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_MAX_POINTER_BYTES = 1024


def names_in(directory: Path) -> list[str]:
    """The names of a directory's entries, sorted. Raises PermissionDeniedError."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except PermissionError as error:
        raise unreadable(directory) from error


def kind_of(path: Path) -> str | None:
    """The kind of `path` in words if it is not a regular file, else None. Links are followed.

    Raises PermissionDeniedError if `path` may not be examined.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise unreadable(path) from error
    except OSError:
        return describe_broken_link(path) if path.is_symlink() else "gone"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a file")


def describe_broken_link(path: Path) -> str:
    """A broken symbolic link, in words."""
    return f"a link to {path.readlink()}, which does not exist"


def is_broken_link(path: Path) -> bool:
    """Whether `path` is a symbolic link to a missing target."""
    return path.is_symlink() and not os.path.exists(path)  # noqa: PTH110 - raises no error


def unreadable(path: Path) -> PermissionDeniedError:
    """The error for a path that this user may not read."""
    return PermissionDeniedError(
        f"{path} cannot be read by user {os.geteuid()}.",
        hint="Give this user read access (chmod o+r; o+x for folders), or move it elsewhere.",
    )


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer to a large file that was not downloaded.

    https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if path.stat().st_size > _MAX_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
