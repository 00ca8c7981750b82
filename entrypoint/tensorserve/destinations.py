"""Where does a new bundle go: a directory or a prefix of S3, all of it or nothing?

A directory appears under its name in one step. On S3 nothing like that exists: there all objects
are uploaded unseen and become visible one right after the other, manifest.json last; in that moment
the manifest of an old bundle that is replaced refuses the new weights.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.format.writer import Output
from tensorserve.linux import fallocate, start_writing
from tensorserve.manifest import MANIFEST, read_manifest
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, list_names

if TYPE_CHECKING:
    from tensorserve.uploading import Upload

_DISK_HINT = "Is the disk full or read-only? Pack to another one, or to s3://bucket/prefix."

_DISK_STEP = 64 * 1024**2  # bytes


class Destination(ABC):
    """A bundle under construction: `create` its files, then `commit` or `discard`."""

    @abstractmethod
    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        """`with destination.create(name, size) as out:`; `size` bytes are going to be written."""

    @abstractmethod
    def commit(self) -> None:
        """The bundle is complete: it takes its name, and what it replaces goes."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what was written. May be called at any time, also twice."""


def open_destination(uri: str, access: Access, *, overwrite: bool, needed: int) -> Destination:
    """Prepares to write `needed` bytes to `uri`, a directory or s3://bucket/prefix.

    Raises ConfigurationError if something is there already (unless it is a bundle and `overwrite`),
    if the disk is too small or cannot be written, and the sources' errors.
    """
    if uri.startswith("s3://"):
        return _Prefix(uri, access, overwrite=overwrite)
    refuse_unwritable(uri)
    from tensorserve.sources.local import local_path

    path = local_path(uri)
    with _explained(path):
        return _Directory(path, access, overwrite=overwrite, needed=needed)


def refuse_unwritable(uri: str) -> None:
    """Raises ConfigurationError for what is neither a directory nor a prefix of S3."""
    if "://" in uri and not uri.startswith(("file://", "s3://")):
        raise ConfigurationError(
            f"{redact_uri(uri)}: a bundle cannot be written there.",
            hint="Use a directory or s3://bucket/prefix.",
        )


def replace_file(bundle_uri: str, name: str, data: bytes, access: Access) -> None:
    """Write one small file of a bundle that is there, in one step: the old one or the new one.

    Raises ConfigurationError where it cannot be written, and the destination's errors.
    """
    refuse_unwritable(bundle_uri)
    if bundle_uri.startswith("s3://"):
        from tensorserve.sources.s3 import account_for
        from tensorserve.sources.s3_uri import split_s3
        from tensorserve.uploading import Bucket, Upload

        bucket, key = split_s3(bundle_uri)
        account = account_for(access.s3)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        upload = Upload(Bucket(account.client(), bucket, account.region), prefix + name, len(data))
        upload.write(data)
        upload.close()
        upload.finish()
        return
    from tensorserve.sources.local import local_path

    path = local_path(bundle_uri) / name
    partial = path.with_name(f".{name}.{secrets.token_hex(4)}.partial")
    with _explained(path):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


class _Directory(Destination):
    """A directory. It is built beside its place, or inside of it where it exists already (it may
    be a mount, which cannot be renamed)."""

    def __init__(self, path: Path, access: Access, *, overwrite: bool, needed: int) -> None:
        self._path = path.resolve()
        self._exists = self._path.exists()
        self._stale: set[str] = set()
        if self._exists:
            if not self._path.is_dir():
                raise ConfigurationError(
                    f"{path} is a file.", hint="Give the name of a new directory."
                )
            present = {child.name for child in self._path.iterdir()}
            if _refuse_present(str(path), present, overwrite=overwrite):
                self._stale = _names_of_old(str(self._path), access)
        parent = self._path if self._exists else self._path.parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ConfigurationError(
                f"{parent} has {free} bytes free, the bundle needs {needed}.",
                hint="Pack to a larger disk, or to s3://bucket/prefix (without a copy on disk).",
            )
        self._staging = parent / f".{self._path.name}.packing-{secrets.token_hex(4)}"
        self._staging.mkdir()
        self._names: list[str] = []

    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        return self._create(name, size)

    @contextmanager
    def _create(self, name: str, size: int) -> Iterator[Output]:
        target = self._staging / name
        with _explained(self._path / name):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer would be written, and fail, once more when the file is closed.
            file = target.open("xb", buffering=0)
        with file:
            with _explained(self._path / name):
                reserve(file.fileno(), size)
            yield _ExplainedFile(file, self._path / name)
            with _explained(self._path / name):
                os.fsync(file.fileno())
        self._names.append(name)

    def commit(self) -> None:
        with _explained(self._path):
            if not self._exists:
                self._staging.rename(self._path)
                sync_directory(self._path.parent)
                return
            # manifest.json was written last: until it is moved, the old one refuses new weights.
            for name in self._names:
                target = self._path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._staging / name).replace(target)
            for name in self._stale.difference(self._names):
                (self._path / name).unlink(missing_ok=True)
            sync_directory(self._path)
            shutil.rmtree(self._staging)

    def discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)


class _Prefix(Destination):
    """A prefix of an S3 bucket."""

    def __init__(self, uri: str, access: Access, *, overwrite: bool) -> None:
        # Not at import: botocore costs a third of a second.
        from tensorserve.sources.s3 import account_for
        from tensorserve.sources.s3_uri import split_s3
        from tensorserve.uploading import Bucket

        bucket, key = split_s3(uri)
        self._prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        account = account_for(access.s3)
        self._present = set(list_names(uri, access) or ())
        direct = {name for name in self._present if "/" not in name}
        self._stale: set[str] = set()
        if _refuse_present(uri, direct, overwrite=overwrite):
            self._stale = _names_of_old(uri, access)
        self._bucket = Bucket(account.client(), bucket, account.region)
        self._uploads: dict[str, Upload] = {}
        self._visible: list[str] = []

    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        return self._create(name, size)

    @contextmanager
    def _create(self, name: str, size: int) -> Iterator[Output]:
        from tensorserve.uploading import Upload

        # Before anything is sent: whatever happens, it is known what there is to abort.
        self._uploads[name] = upload = Upload(self._bucket, self._prefix + name, size)
        yield upload
        upload.close()

    def commit(self) -> None:
        # All that takes long has been done. In the order of their making: the manifest is last.
        while self._uploads:
            name = next(iter(self._uploads))
            # Before, not after: where the answer is lost, the object may be there all the same.
            self._visible.append(name)
            self._uploads[name].finish()
            del self._uploads[name]
        for name in sorted(self._stale.difference(self._visible)):
            self._bucket.delete(self._prefix + name)
        self._visible.clear()

    def discard(self) -> None:
        failures = []
        while self._uploads:
            _, upload = self._uploads.popitem()
            try:
                upload.abort()
            except TensorserveError as error:
                failures.append(error)
        # What stood there before and was replaced is left: deleting it would not bring it back.
        while self._visible:
            name = self._visible.pop()
            try:
                if name not in self._present:
                    self._bucket.delete(self._prefix + name)
            except TensorserveError as error:
                failures.append(error)
        if failures:
            raise failures[0]


class _ExplainedFile:
    """A file whose errors name it. It goes to the disk while it is written, not all at the end."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._written = 0

    def write(self, data: bytes | memoryview, /) -> None:
        rest = memoryview(data)
        with _explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._written += len(data)
        if self._written >= _DISK_STEP:
            self._written = 0
            start_writing(self._file.fileno())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} could not be written: {error.strerror or error}.", hint=_DISK_HINT
        ) from error


def _refuse_present(name: str, present: set[str], *, overwrite: bool) -> bool:
    """Whether a bundle stands there that is to be replaced."""
    present = {n for n in present if not n.startswith(".") and n != "lost+found"}
    if not present:
        return False
    if not any(n == MANIFEST or n.endswith(".tensors") for n in present):
        raise ConfigurationError(
            f"{redact_uri(name)} holds other files ({min(present)}, …) and is not a bundle.",
            hint="Give a new directory or prefix; only a bundle can be replaced.",
        )
    if not overwrite:
        raise ConfigurationError(
            f"{redact_uri(name)} is a bundle already.",
            hint="Give a new name (running servers keep theirs), or add --overwrite.",
        )
    return True


def _names_of_old(uri: str, access: Access) -> set[str]:
    """What the bundle that is replaced consists of, as far as its manifest says."""
    try:
        old = read_manifest(uri, access, None)
    except (CorruptError, ConfigurationError):
        return set()  # a damaged one, or a later version's: it is going to be replaced
    if old is None:
        return set()
    return {entry.name for entry in old.files} | set(old.tensors_files)


def reserve(descriptor: int, size: int) -> None:
    """Have the file system set aside `size` bytes: a full disk is found before they are written,
    and large files are written twice as fast. Where it cannot, nothing is done. Raises OSError.
    """
    if not size:
        return
    try:
        fallocate(descriptor, 0, 0, size)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            raise


def sync_directory(path: Path) -> None:
    """fsync for the names in a directory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
