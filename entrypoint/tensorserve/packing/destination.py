"""How is a bundle written to a directory or a bucket's prefix, completely or not at all?

A directory gets its name in one step (rename). A bucket has no such step: all objects are uploaded
in parts, which are invisible, and then completed in quick succession, manifest.json last.
While an existing bundle is replaced in this way, its old manifest does not match the new weights,
so that a start in that moment fails.
"""

from __future__ import annotations

import fcntl
import io
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, read_manifest
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.format.writer import Output
from tensorserve.packing.disk_files import DiskFile, explained, reserve, sync_directory
from tensorserve.packing.part_upload import PartUpload, Store
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, NotFoundError, ReplacedError, list_names
from tensorserve.sources.schemes import SCHEMES

_PIECE = 1024**2
# {scheme: the module of this package that writes to it}
_WRITERS = {"s3": "s3_upload", "gs": "gcs_upload", "az": "azure_upload"}


class Destination(ABC):
    """A bundle under construction: `create` its files, then `commit` or `discard`.

    A `with` block commits at its end, and discards on any error, KeyboardInterrupt included.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._give_up(error)
            return
        try:
            self.commit()
        except BaseException as failure:
            self._give_up(failure)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Discards because of `error`, which is raised whatever becomes of that."""
        try:
            self.discard()
        except TensorserveError as failure:
            error.add_note(f"The written files could not be removed: {failure.message}")

    @abstractmethod
    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        """`with destination.create(name, size) as out:` opens a new file for `size` bytes."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the complete bundle visible and removes files of the bundle that it replaces."""

    @abstractmethod
    def discard(self) -> None:
        """Removes the written files. May be called at any time, also twice."""


def open_destination(uri: str, access: Access, *, overwrite: bool, needed: int) -> Destination:
    """Prepares to write `needed` bytes to `uri`, a directory or a prefix of a bucket.

    Raises ConfigurationError if `uri` is not empty (unless it is a bundle and `overwrite` is set),
    or if the disk is too small or not writable; and the sources' errors.
    """
    if _writer_of(uri) is not None:
        return _Prefix(uri, access, overwrite=overwrite)
    refuse_unwritable(uri)
    from tensorserve.sources.local import local_path

    path = local_path(uri)
    with explained(path):
        return _Directory(path, access, overwrite=overwrite, needed=needed)


def refuse_unwritable(uri: str) -> None:
    """Raises ConfigurationError unless `uri` is a directory or a prefix that can be written."""
    if "://" in uri and not uri.startswith("file://") and _writer_of(uri) is None:
        raise ConfigurationError(
            f"{redact_uri(uri)}: a bundle cannot be written there.",
            hint=f"Use a directory, {', '.join(SCHEMES[name].example for name in _WRITERS)}.",
        )


def _writer_of(uri: str) -> str | None:
    """The module that writes to the scheme of `uri`; None for a directory and what is read only."""
    scheme, separator, _ = uri.partition("://")
    return _WRITERS.get(scheme) if separator else None


def _store(uri: str, access: Access) -> Store:
    # Imported here: importing botocore takes a third of a second.
    module = import_module(f"{__package__}.{_writer_of(uri)}")
    store: Store = module.open_store(uri, access)
    return store


def replace_file(bundle_uri: str, name: str, data: bytes, access: Access) -> None:
    """Replaces one small file of an existing bundle in one step (rename, or one request).

    Raises ConfigurationError if it cannot be written, and the sources' errors.
    """
    add_file(bundle_uri, name, io.BytesIO(data), access)


def add_file(bundle_uri: str, name: str, file: BinaryIO, access: Access) -> None:
    """Writes all of `file` as `name`, also in a folder, of an existing bundle in one step.

    What has this name is replaced. Raises as replace_file.
    """
    refuse_unwritable(bundle_uri)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if _writer_of(bundle_uri) is not None:
        upload = _store(bundle_uri, access).upload(name, size)
        try:
            while piece := file.read(_PIECE):
                upload.write(piece)
            upload.close()
            upload.finish()
        except BaseException:
            upload.abort()
            raise
        return
    from tensorserve.sources.local import local_path

    path = local_path(bundle_uri) / name
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with explained(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with partial.open("xb") as out:
                shutil.copyfileobj(file, out, _PIECE)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(path)
            sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def version_of(bundle_uri: str, name: str, access: Access) -> str:
    """What names the version of a small file that is there now, for `replace_version`.

    Raises NotFoundError, and the sources' errors.
    """
    if _writer_of(bundle_uri) is not None:
        return _store(bundle_uri, access).version(name)
    from tensorserve.sources.local import local_path

    return _identity(local_path(bundle_uri) / name)


def replace_version(bundle_uri: str, name: str, data: bytes, access: Access, version: str) -> None:
    """As replace_file, but only while the file has this `version`; else raises ReplacedError.

    A store compares and writes in one step (If-Match). In a directory, writers that call this
    function wait for each other; others may come between.
    """
    refuse_unwritable(bundle_uri)
    if _writer_of(bundle_uri) is not None:
        if not _store(bundle_uri, access).replace(name, data, version):
            raise _replaced(bundle_uri, name)
        return
    from tensorserve.sources.local import local_path

    directory = local_path(bundle_uri)
    with explained(directory / name), _locked(directory):
        if _identity(directory / name) != version:
            raise _replaced(bundle_uri, name)
        replace_file(bundle_uri, name, data, access)


def _replaced(bundle_uri: str, name: str) -> ReplacedError:
    return ReplacedError(
        f"{redact_uri(bundle_uri)}: {name} was replaced by somebody else meanwhile; nothing was "
        "written.",
        hint="Run the command again.",
    )


def _identity(path: Path) -> str:
    from tensorserve.sources.local import file_identity

    try:
        return file_identity(path.stat())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist.") from error
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Directory(Destination):
    """A directory. The bundle is built in a temporary directory beside it.

    If the directory exists, the temporary one is inside it: it may be a mount point, which cannot
    be renamed.
    """

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
                # A signature is of the bundle that is replaced.
                self._stale = _names_of_old(str(self._path), access) | {SIGNATURE} & present
        parent = self._path if self._exists else self._path.parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ConfigurationError(
                f"{parent} has {free} bytes free, the bundle needs {needed}.",
                hint="Pack to a larger disk, or to s3://, gs:// or az:// (without a copy on disk).",
            )
        self._staging = parent / f".{self._path.name}.packing-{secrets.token_hex(4)}"
        self._staging.mkdir()
        self._names: list[str] = []

    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        return self._create(name, size)

    @contextmanager
    def _create(self, name: str, size: int) -> Iterator[Output]:
        target = self._staging / name
        with explained(self._path / name):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: after a failed write, close() would try to write the buffer again.
            file = target.open("xb", buffering=0)
        with file:
            with explained(self._path / name):
                reserve(file.fileno(), size)
            yield DiskFile(file, self._path / name)
            with explained(self._path / name):
                os.fsync(file.fileno())
        self._names.append(name)

    def commit(self) -> None:
        with explained(self._path):
            if not self._exists:
                self._staging.rename(self._path)
                sync_directory(self._path.parent)
                return
            # manifest.json was written last, so it is moved last. Until then, the old manifest does
            # not match the new weights.
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
    """A prefix of a bucket."""

    def __init__(self, uri: str, access: Access, *, overwrite: bool) -> None:
        self._present = set(list_names(uri, access) or ())
        direct = {name for name in self._present if "/" not in name}
        self._stale: set[str] = set()
        if _refuse_present(uri, direct, overwrite=overwrite):
            self._stale = _names_of_old(uri, access) | {SIGNATURE} & direct
        self._store = _store(uri, access)
        self._uploads: dict[str, PartUpload] = {}
        self._visible: list[str] = []

    def create(self, name: str, size: int) -> AbstractContextManager[Output]:
        return self._create(name, size)

    @contextmanager
    def _create(self, name: str, size: int) -> Iterator[Output]:
        # Recorded before anything is sent, so that discard() can abort it.
        self._uploads[name] = upload = self._store.upload(name, size)
        yield upload
        upload.close()

    def commit(self) -> None:
        # In order of creation, so that the manifest is last. The data has been sent already.
        while self._uploads:
            name = next(iter(self._uploads))
            # Recorded before the request: the object may exist although the answer is lost.
            self._visible.append(name)
            self._uploads[name].finish()
            del self._uploads[name]
        for name in sorted(self._stale.difference(self._visible)):
            self._store.delete(name)
        self._visible.clear()

    def discard(self) -> None:
        failures = []
        while self._uploads:
            _, upload = self._uploads.popitem()
            try:
                upload.abort()
            except TensorserveError as error:
                failures.append(error)
        # Objects that replaced older ones are kept: deleting them would not restore the old ones.
        while self._visible:
            name = self._visible.pop()
            try:
                if name not in self._present:
                    self._store.delete(name)
            except TensorserveError as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _refuse_present(name: str, present: set[str], *, overwrite: bool) -> bool:
    """Whether `present` (names) are a bundle to replace; False for an empty place.

    Raises ConfigurationError for other files, and for a bundle without `overwrite`.
    """
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
            hint="Give a new name (running servers keep the old bundle), or add --overwrite.",
        )
    return True


def _names_of_old(uri: str, access: Access) -> set[str]:
    """The files in the manifest of the bundle to replace; empty if it has no readable manifest."""
    try:
        old = read_manifest(uri, access, None)
    except (CorruptError, ConfigurationError):
        return set()  # damaged, or of a later version: it is replaced anyway
    if old is None:
        return set()
    return {entry.name for entry in old.files} | set(old.tensors_files)
