"""Which files may an archive of compiled code hold, and how are they packed and unpacked?

A gzip-compressed tar archive of regular files, read by our own rules: tarfile parses the headers,
and nothing else of tarfile writes a file. Modification times are kept to the nanosecond: ninja,
which FlashInfer builds with, compares them.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from tensorserve.bundle.compiled import MAX_FILES, MAX_FILES_BYTES, Contents
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.errors import ConfigurationError, CorruptError

_PIECE = 256 * 1024
# What tarfile reads and writes at once. For each, zlib copies what it has not unpacked yet.
_BLOCK = 1024**2
_GZIP = 31  # zlib's wbits for a gzip stream
_MTIME = "mtime"
# The kernel's own limit for a component of a path; ext4, xfs and tmpfs.
_MAX_COMPONENT = 255
# tar's header and padding for a file, with an extended header of two blocks.
_OVERHEAD = 4096


def files_below(root: Path) -> dict[str, os.stat_result]:
    """{name relative to `root`: its lstat} of all files below `root`, sorted by name.

    Raises ConfigurationError for what is neither a directory nor a regular file.
    """
    found: dict[str, os.stat_result] = {}
    for directory, folders, files in os.walk(root):
        for entry in sorted((*folders, *files)):
            path = Path(directory, entry)
            info = path.lstat()
            if stat.S_ISDIR(info.st_mode):
                continue
            name = path.relative_to(root).as_posix()
            if not stat.S_ISREG(info.st_mode):
                raise ConfigurationError(
                    f"{name} below the cache is not a regular file (a link, a device, a socket or "
                    "such): it is not packed.",
                    hint="Please report it, with the variables and the model.",
                )
            if leaves_bundle(name):
                raise ConfigurationError(f"{name!r} is not a name that can be packed.")
            found[name] = info
    return dict(sorted(found.items()))


def pack_files(root: Path, names: dict[str, os.stat_result], out: BinaryIO) -> Contents:
    """Writes the archive of the files `names` (of files_below) to `out`.

    Raises ConfigurationError for a file that changed since, and beyond the limits.
    """
    total = sum(info.st_size for info in names.values())
    if len(names) > MAX_FILES or total > MAX_FILES_BYTES:
        raise ConfigurationError(
            f"{len(names)} files with {total} bytes are too much for a sealed cache; the limits "
            f"are {MAX_FILES} files and {MAX_FILES_BYTES} bytes."
        )
    counting = _Deflated(out)
    with tarfile.open(
        fileobj=counting, mode="w|", bufsize=_BLOCK, format=tarfile.PAX_FORMAT
    ) as tar:
        for name, info in names.items():
            with open(root / name, "rb", opener=_without_links) as file:
                now = os.fstat(file.fileno())
                if (now.st_size, now.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
                    raise ConfigurationError(f"{name} changed while it was packed.")
                member = tarfile.TarInfo(name)
                member.size = info.st_size
                member.mode = 0o700 if info.st_mode & stat.S_IXUSR else 0o600
                seconds, rest = divmod(info.st_mtime_ns, 10**9)
                # As text: a float is exact to some hundred nanoseconds only.
                member.pax_headers = {_MTIME: f"{seconds}.{rest:09d}"}
                tar.addfile(member, file)
    counting.finish()
    return Contents(counting.written, len(names), total)


def unpack_files(chunks: Iterator[bytes], contents: Contents, directory: Path, name: str) -> None:
    """Writes the archive's files below `directory`, which is new, empty and private.

    `chunks` is the archive, of `contents`; `name` names it in errors. Raises CorruptError for
    anything but regular files with names below `directory`, each once, and exactly of `contents`;
    ConfigurationError if the disk is full.
    """
    unpacked, files = 0, 0
    most = contents.files_bytes + (contents.files + 8) * _OVERHEAD
    try:
        with tarfile.open(fileobj=_Inflated(chunks, most), mode="r|", bufsize=_BLOCK) as tar:
            for member in tar:
                _refuse(member)
                files, unpacked = files + 1, unpacked + member.size
                if files > contents.files or unpacked > contents.files_bytes:
                    raise ValueError("it holds more than its header says")
                source = tar.extractfile(member)
                assert source is not None
                _write(source, member, directory)
        if (files, unpacked) != (contents.files, contents.files_bytes):
            raise ValueError("it holds less than its header says")
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise CorruptError(
            f"{name}: its archive is refused: {error}.",
            hint="It was sealed with the right key, by something else than `tensorserve "
            "precompile`. Find out who has the key, and run the job again.",
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{directory} could not be written: {error.strerror}.",
            hint="Give the disk more room, or set TENSORSERVE_COMPILED=off.",
        ) from error


def _refuse(member: tarfile.TarInfo) -> None:
    """Raises ValueError for what is not a plain file below the directory."""
    if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.issparse():
        raise ValueError(f"{member.name[:200]!r} is not a regular file")
    if member.size < 0:
        raise ValueError(f"{member.name[:200]!r} has a negative size")
    parts = PurePosixPath(member.name).parts
    if leaves_bundle(member.name) or any(len(os.fsencode(p)) > _MAX_COMPONENT for p in parts):
        raise ValueError(f"{member.name[:200]!r} is not a name below the cache")


def _write(source: IO[bytes], member: tarfile.TarInfo, directory: Path) -> None:
    target = directory.joinpath(*PurePosixPath(member.name).parts)
    try:
        for parent in reversed(target.relative_to(directory).parents):
            (directory / parent).mkdir(exist_ok=True, mode=0o700)
        # "x": a name that comes twice is refused. No links: there are none in the directory.
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"it names {member.name[:200]!r} twice") from None
    with open(descriptor, "wb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)
        file.flush()
        if member.mode & stat.S_IXUSR:
            os.fchmod(descriptor, 0o700)
        moment = _nanoseconds(member)
        os.utime(descriptor, ns=(moment, moment))


def _nanoseconds(member: tarfile.TarInfo) -> int:
    """When the file was modified."""
    seconds, _, rest = str(member.pax_headers.get(_MTIME, int(member.mtime))).partition(".")
    if not (seconds.isdecimal() and len(seconds) < 12 and (rest + "0").isdecimal()):
        raise ValueError(f"{member.name[:200]!r} has no valid modification time")
    return int(seconds) * 10**9 + int(rest.ljust(9, "0")[:9])


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


class _Deflated(io.RawIOBase):
    """What tarfile writes to: gzip, counted."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__()
        self._out, self._packer, self.written = out, zlib.compressobj(6, wbits=_GZIP), 0

    def write(self, data: Any, /) -> int:
        """Takes all of `data`."""
        self._put(self._packer.compress(data))
        return len(data)

    def finish(self) -> None:
        """Writes what is still held back."""
        self._put(self._packer.flush())

    def _put(self, data: bytes) -> None:
        self._out.write(data)
        self.written += len(data)


class _Inflated(io.RawIOBase):
    """What tarfile reads from: at most `most` bytes come out, however well they compress."""

    def __init__(self, chunks: Iterator[bytes], most: int) -> None:
        super().__init__()
        self._chunks, self._left, self._held = chunks, most, b""
        self._unpacker = zlib.decompressobj(wbits=_GZIP)

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; fewer at the end only. Raises ValueError beyond the limit."""
        made = bytearray()
        while len(made) < size and not self._unpacker.eof:
            self._held = self._held or next(self._chunks, b"")
            # Without input, zlib gives what it still holds back.
            more = self._unpacker.decompress(self._held, size - len(made))
            if not self._held and not more:
                raise EOFError("it is cut off")
            made += more
            self._held = self._unpacker.unconsumed_tail
        self._left -= len(made)
        if self._left < 0:
            raise ValueError("it unpacks to more than its header says")
        return bytes(made)
