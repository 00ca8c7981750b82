"""How does a Hugging Face directory become a bundle: tensors, small files, manifest?

Nothing is unpickled and no model code runs: tensors go from safetensors to .tensors as bytes, one
at a time, sealed on the way. There is no plain-text copy and, for S3, no copy on disk.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tensorserve import __version__
from tensorserve.checkpoint import Checkpoint, CheckpointReader, read_checkpoint
from tensorserve.destinations import Destination, open_destination
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError, UsageError
from tensorserve.format import (
    CHUNK_BYTES,
    KEY_SIZE,
    FileKey,
    FilePlan,
    TensorSpec,
    fresh_password_hash,
    plan_file,
    write_file,
)
from tensorserve.keys import parse_key, parse_passphrase
from tensorserve.manifest import MANIFEST, Encryption, FileEntry, Manifest, TensorsEntry
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.sources.local import LocalSource

TENSORS_NAME = "model.tensors"
CIPHER = "xsalsa20-poly1305"
# Room for the manifest and the file system's own needs.
_SPARE_BYTES = 16 * 1024**2
_COPY_BYTES = 4 * 1024**2
_MAX_KEY_FILE = 4096

# (bytes of tensors written, bytes of tensors in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackResult:
    """What was packed. ``str()`` of it is fit for the terminal."""

    destination: str  # redacted
    tensors: int
    data_bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    key_origin: str | None  # None: not encrypted
    seconds: float

    def __str__(self) -> str:
        sealed = f"encrypted, key from {self.key_origin}" if self.key_origin else "NOT ENCRYPTED"
        lines = [
            f"{self.destination}: {self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB, {sealed}",
            f"  with {', '.join(self.files)}",
        ]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        lines.append(f"  in {self.seconds:.1f} s")
        return "\n".join(lines)


def pack(
    src: Path,
    dest: str,
    *,
    access: Access,
    key: Secret | None = None,
    passphrase: Secret | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs `src` (a Hugging Face directory, or one safetensors file in one) into a bundle.

    `dest` is a directory or s3://bucket/prefix; `overwrite` lets a bundle there be replaced. With a
    key or a passphrase (not both) the tensors are encrypted. Memory: the largest tensor, and a few
    16 MiB parts for S3. On any error, KeyboardInterrupt included, what was written is removed.
    Raises ConfigurationError for an unfit source, destination or key, CorruptError for a damaged
    source, and the destination's errors.
    """
    started = time.monotonic()
    if key is not None and passphrase is not None:
        raise ConfigurationError("Both a key and a passphrase are given.", hint="Give one of them.")
    opened_by: FileKey | None = None
    if key is not None:
        opened_by = parse_key(key)
    elif passphrase is not None:
        opened_by = parse_passphrase(passphrase)
    checkpoint = read_checkpoint(src)
    _refuse_inside(checkpoint, dest)
    plan = plan_file(
        (TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors),
        encrypted=opened_by is not None,
        derivation=fresh_password_hash() if passphrase is not None else None,
    )
    needed = plan.index.size + sum(checkpoint.files.values()) + _SPARE_BYTES
    destination = open_destination(dest, access, overwrite=overwrite, needed=needed)
    try:
        # The largest and likeliest to fail first; what makes it a bundle last.
        tensors = _write_tensors(destination, checkpoint, plan, opened_by, progress)
        files = tuple(
            _copy(destination, checkpoint, name, size) for name, size in checkpoint.files.items()
        )
        manifest = Manifest(
            files=files,
            tensors_files={TENSORS_NAME: tensors},
            encryption=None
            if opened_by is None
            else Encryption(CIPHER, CHUNK_BYTES, "key" if passphrase is None else "passphrase"),
            made_by={"tensorserve": __version__},
        ).to_json()
        with destination.create(MANIFEST, len(manifest)) as out:
            out.write(manifest)
        destination.commit()
    except BaseException as error:
        try:
            destination.discard()
        except TensorserveError as failure:
            # The first error is the one to show.
            error.add_note(f"What was written could not be removed: {failure.message}")
        raise
    return PackResult(
        destination=redact_uri(dest),
        tensors=len(plan.index.tensors),
        data_bytes=plan.index.data_bytes,
        files=tuple(checkpoint.files),
        left_out=checkpoint.left_out,
        key_origin=opened_by.origin if opened_by else None,
        seconds=time.monotonic() - started,
    )


def prepare_key(
    key_file: Path | None, passphrase_file: Path | None
) -> tuple[Secret | None, Secret | None]:
    """(key, passphrase) for `pack`, from the files that the user names.

    A key file that does not exist is made: 32 random bytes, raw, as vLLM's `encryption_keyfile`
    wants them, readable by its owner only. Raises UsageError if both are given, ConfigurationError
    if a file cannot be read or made or holds no key.
    """
    if key_file is not None and passphrase_file is not None:
        raise UsageError("--key-file and --passphrase-file exclude each other.")
    if passphrase_file is not None:
        passphrase = Secret(_read_secret(passphrase_file), str(passphrase_file))
        parse_passphrase(passphrase)
        return None, passphrase
    if key_file is None:
        return None, None
    made = _make_key(key_file)
    key = Secret(made, f"{key_file} (new: keep a copy)") if made else None
    key = key or Secret(_read_secret(key_file), str(key_file))
    parse_key(key)
    return key, None


def _write_tensors(
    destination: Destination,
    checkpoint: Checkpoint,
    plan: FilePlan,
    key: FileKey | None,
    progress: Progress | None,
) -> TensorsEntry:
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, plan.index.data_bytes)

    reader = CheckpointReader(checkpoint)
    try:
        with destination.create(TENSORS_NAME, plan.index.size) as out:
            headers = write_file(
                out,
                plan,
                lambda record, start, view: reader.read_into(record.name, start, view),
                key=key,
                on_bytes=count,
            )
    finally:
        reader.close()
    return TensorsEntry(
        size=plan.index.size,
        tensors=len(plan.index.tensors),
        data_bytes=plan.index.data_bytes,
        index_sha256=plan.index.digest,
        headers_sha256=headers,
    )


def _copy(destination: Destination, checkpoint: Checkpoint, name: str, size: int) -> FileEntry:
    source = LocalSource(checkpoint.directory / name)
    digest = hashlib.sha256()
    try:
        if source.size != size:
            raise CorruptError(f"{source.name} was changed while it was packed.")
        with destination.create(name, size) as out:
            for offset in range(0, size, _COPY_BYTES):
                data = source.read(offset, min(_COPY_BYTES, size - offset))
                digest.update(data)
                out.write(data)
    finally:
        source.close()
    return FileEntry(name, size, digest.hexdigest())


def _refuse_inside(checkpoint: Checkpoint, dest: str) -> None:
    if "://" in dest:
        return
    source, target = checkpoint.directory.resolve(), Path(dest).resolve()
    if target.is_relative_to(source):
        raise ConfigurationError(
            f"The bundle would lie inside of the model's own directory {source}.",
            hint="Give a directory beside it.",
        )


def _make_key(path: Path) -> bytes | None:
    """A fresh key, written to `path`; None if that exists."""
    key = os.urandom(KEY_SIZE)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"The key file {path} could not be made: {error.strerror}.",
            hint="Name a file in a directory that exists and can be written.",
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigurationError(
            f"The key file {path} could not be written: {error.strerror}."
        ) from error
    return key


def _read_secret(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} could not be read: {error.strerror}.") from error
    if len(data) > _MAX_KEY_FILE:
        raise ConfigurationError(
            f"{path} holds more than {_MAX_KEY_FILE} bytes: it is no key or passphrase."
        )
    return data
