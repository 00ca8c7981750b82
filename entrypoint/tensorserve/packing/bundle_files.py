"""How are the files of a new bundle written, so that a manifest can describe them?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tensorserve.bundle.manifest import FileEntry, TensorsEntry
from tensorserve.format import FileKey, PasswordHash, plan_file, write_file
from tensorserve.packing.destination import Destination
from tensorserve.packing.model_signer import HashedOutput
from tensorserve.packing.tensor_source import TensorsSource

SPARE_BYTES = 16 * 1024**2
"""Room for the manifest, headers, tags and the file system's metadata."""

# (bytes of tensors written, bytes of tensors in all)
Progress = Callable[[int, int], None]


class TensorsFile:
    """A .tensors file to be written."""

    def __init__(
        self, name: str, source: TensorsSource, sealed: bool, derivation: PasswordHash | None
    ) -> None:
        self.name, self.source = name, source
        self.plan = plan_file(source.specs, encrypted=sealed, derivation=derivation)


class Count:
    """Bytes of tensors written so far, of all files."""

    def __init__(self, whole: int, progress: Progress | None) -> None:
        self.whole = whole
        self._done = 0
        self._progress = progress

    def __call__(self, written: int) -> None:
        self._done += written
        if self._progress is not None:
            self._progress(self._done, self.whole)


def write_tensors(
    destination: Destination,
    file: TensorsFile,
    key: FileKey | None,
    count: Count,
    threads: int | None,
    signed: dict[str, str] | None = None,
) -> TensorsEntry:
    """Writes one .tensors file, encrypted where there is a `key`; gives its manifest entry.

    Where `signed` is given, the file's SHA-256 is put into it.
    """
    index = file.plan.index
    with file.source.reading() as read, destination.create(file.name, index.size) as out:
        hashed = None if signed is None else HashedOutput(out)
        written = write_file(
            hashed or out,
            file.plan,
            lambda record, start, view: read(record.name, start, view),
            key=key,
            on_bytes=count,
            threads=threads,
        )
    if signed is not None and hashed is not None:
        signed[file.name] = hashed.sha256()
    return TensorsEntry(
        size=index.size,
        tensors=len(index.tensors),
        data_bytes=index.data_bytes,
        index_sha256=index.digest,
        headers_sha256=written.headers_sha256,
        digests=written.tensors if key is not None else None,
    )


def write_whole(destination: Destination, name: str, data: bytes) -> FileEntry:
    """Writes a small file; gives its manifest entry."""
    with destination.create(name, len(data)) as out:
        out.write(data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
