"""How are the files of a new bundle written, so that a manifest can describe them?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tensorserve.bundle.keys import ModelKey, Passphrase, parse_key, parse_passphrase
from tensorserve.bundle.manifest import CIPHER, Encryption, FileEntry, TensorsEntry
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import CHUNK_BYTES, FileKey, PasswordHash, plan_file, write_file
from tensorserve.packing.checkpoint import Checkpoint
from tensorserve.packing.destination import Destination
from tensorserve.packing.model_signer import HashedOutput
from tensorserve.packing.tensor_source import TensorsSource
from tensorserve.secret import Secret
from tensorserve.sources.local import LocalSource

SPARE_BYTES = 16 * 1024**2
"""Room for the manifest, headers, tags and the file system's metadata."""
_COPY_BYTES = 4 * 1024**2

# (bytes of tensors written, bytes of tensors in all)
Progress = Callable[[int, int], None]


def given_key(key: Secret | None, passphrase: Secret | None) -> ModelKey | None:
    """What opens a new bundle; None: it is plain. Raises ConfigurationError for both, and for what
    is no key or passphrase.
    """
    if key is not None and passphrase is not None:
        raise ConfigurationError("Both a key and a passphrase are given.", hint="Give only one.")
    if key is not None:
        return parse_key(key)
    return None if passphrase is None else parse_passphrase(passphrase)


def encryption_of(key: ModelKey | None) -> Encryption | None:
    """What the manifest says of a bundle that `key` opens."""
    if key is None:
        return None
    made_of = "passphrase" if isinstance(key, Passphrase) else "key"
    return Encryption(CIPHER, CHUNK_BYTES, made_of)


class PlannedFile:
    """A .tensors file to be written."""

    def __init__(
        self, name: str, source: TensorsSource, sealed: bool, derivation: PasswordHash | None
    ) -> None:
        self.name, self.source = name, source
        self.plan = plan_file(source.specs, encrypted=sealed, derivation=derivation)


class ByteCount:
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
    file: PlannedFile,
    key: FileKey | None,
    count: ByteCount,
    threads: int | None,
    signed: dict[str, str] | None = None,
) -> TensorsEntry:
    """Writes a .tensors file, sealed with `key` if there is one; gives its manifest entry.

    Where `signed` is given, the file's SHA-256 is put into it. Raises the destination's errors, and
    CorruptError for a source that was changed meanwhile.
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


def copy_file(
    destination: Destination, checkpoint: Checkpoint, name: str, size: int, target: str
) -> FileEntry:
    """Copies the small file `name` of `checkpoint` to `target`. Raises as write_tensors."""
    source = LocalSource(checkpoint.directory / name)
    digest = hashlib.sha256()
    try:
        if source.size != size:
            raise CorruptError(
                f"{source.name} was changed while it was packed.",
                hint="Pack again when no other process writes to the model's directory.",
            )
        with destination.create(target, size) as out:
            for offset in range(0, size, _COPY_BYTES):
                data = source.read(offset, min(_COPY_BYTES, size - offset))
                digest.update(data)
                out.write(data)
    finally:
        source.close()
    return FileEntry(target, size, digest.hexdigest())


def write_small(destination: Destination, name: str, data: bytes) -> FileEntry:
    """Writes `data` as a small file; gives its manifest entry. Raises the destination's errors."""
    with destination.create(name, len(data)) as out:
        out.write(data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())
