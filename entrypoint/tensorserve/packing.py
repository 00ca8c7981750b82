"""How does a Hugging Face directory become a bundle: tensors, small files, manifest?

Nothing is unpickled and no model code runs: tensors go from safetensors to .tensors as bytes, one
at a time, sealed on the way. There is no plain-text copy and, for S3, no copy on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorserve import __version__
from tensorserve.casting import Casting
from tensorserve.checkpoint import Checkpoint, CheckpointReader, read_checkpoint
from tensorserve.destinations import Destination, open_destination
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError, UsageError
from tensorserve.format import (
    CHUNK_BYTES,
    FileKey,
    PasswordHash,
    TensorSpec,
    fresh_password_hash,
    plan_file,
    write_file,
)
from tensorserve.keys import parse_key, parse_passphrase
from tensorserve.lora import WEIGHTS, adapter_file
from tensorserve.manifest import MANIFEST, Encryption, FileEntry, Manifest, TensorsEntry
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.sources.local import LocalSource

TENSORS_NAME = "model.tensors"
CIPHER = "xsalsa20-poly1305"
# Room for the manifest and the file system's own needs.
_SPARE_BYTES = 16 * 1024**2
_COPY_BYTES = 4 * 1024**2

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
    adapters: tuple[str, ...]
    key_origin: str | None  # None: not encrypted
    seconds: float

    def __str__(self) -> str:
        sealed = f"encrypted, key from {self.key_origin}" if self.key_origin else "NOT ENCRYPTED"
        lines = [
            f"{self.destination}: {self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB, {sealed}",
            f"  with {', '.join(self.files)}",
        ]
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
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
    adapters: Mapping[str, Checkpoint] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs `src` (a Hugging Face directory, or one safetensors file in one) into a bundle.

    `dest` is a directory or s3://bucket/prefix; `overwrite` lets a bundle there be replaced. With a
    key or a passphrase (not both) the tensors are encrypted, those of `adapters` (lora.py) as well.
    `dtype` converts the model's floating-point tensors (casting.py); `threads` bounds how many
    encrypt. Memory: the largest tensor, and a few 16 MiB parts for S3. On any error,
    KeyboardInterrupt included, what was written is removed. Raises ConfigurationError for an unfit
    source, destination or key, CorruptError for a damaged source, and the destination's errors.
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
    casting = Casting(checkpoint, dtype) if dtype is not None else None
    if casting is not None:
        checkpoint = casting.checkpoint
    derivation = fresh_password_hash() if passphrase is not None else None
    parts = [_Part(checkpoint, TENSORS_NAME, "", opened_by is not None, derivation)]
    for name, adapter in sorted((adapters or {}).items()):
        folder = adapter_file(name, "")
        parts.append(_Part(adapter, folder + WEIGHTS, folder, opened_by is not None, derivation))
    _refuse_twice(parts)
    needed = sum(part.size for part in parts) + _SPARE_BYTES
    destination = open_destination(dest, access, overwrite=overwrite, needed=needed)
    count = _Count(sum(part.plan.index.data_bytes for part in parts), progress)
    try:
        # The largest and likeliest to fail first; what makes it a bundle last.
        tensors = {
            part.tensors_name: _write_tensors(
                destination, part, opened_by, count, casting if not part.folder else None, threads
            )
            for part in parts
        }
        files = tuple(
            _write(destination, name, casting.config())
            if casting is not None and part.folder + name == "config.json"
            else _copy(destination, part.checkpoint, name, size, part.folder + name)
            for part in parts
            for name, size in part.checkpoint.files.items()
        )
        manifest = Manifest(
            files=files,
            tensors_files=tensors,
            encryption=None
            if opened_by is None
            else Encryption(CIPHER, CHUNK_BYTES, "key" if passphrase is None else "passphrase"),
            made_by={"tensorserve": __version__},
        ).to_json()
        _write(destination, MANIFEST, manifest)
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
        tensors=sum(len(part.plan.index.tensors) for part in parts),
        data_bytes=count.whole,
        files=tuple(checkpoint.files),
        left_out=tuple(part.folder + name for part in parts for name in part.checkpoint.left_out),
        adapters=tuple(sorted(adapters or ())),
        key_origin=opened_by.origin if opened_by else None,
        seconds=time.monotonic() - started,
    )


def with_suffix(dest: str, model: str, suffix: str) -> str:
    """`dest`/vllm/<model>/<suffix>, as vLLM's own script lays out its models."""
    for part in (model, suffix):
        if not part.strip("/.") or part != part.strip("/") or ".." in part.split("/"):
            raise UsageError(f"--suffix: {part!r} cannot be part of a path.")
    return f"{dest.rstrip('/')}/vllm/{model}/{suffix}"


class _Part:
    """A checkpoint and where it goes in the bundle: the model itself, or an adapter."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors_name: str,
        folder: str,
        encrypted: bool,
        derivation: PasswordHash | None,
    ) -> None:
        self.checkpoint, self.tensors_name, self.folder = checkpoint, tensors_name, folder
        self.plan = plan_file(
            (TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.tensors),
            encrypted=encrypted,
            derivation=derivation,
        )
        self.size = self.plan.index.size + sum(checkpoint.files.values())


class _Count:
    """Bytes of tensors written so far, of all files."""

    def __init__(self, whole: int, progress: Progress | None) -> None:
        self.whole = whole
        self._done = 0
        self._progress = progress

    def __call__(self, written: int) -> None:
        self._done += written
        if self._progress is not None:
            self._progress(self._done, self.whole)


def _refuse_twice(parts: list[_Part]) -> None:
    names = [part.tensors_name for part in parts]
    names += [part.folder + name for part in parts for name in part.checkpoint.files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"The model's own directory has a file that the adapter would take: {twice[0]}.",
            hint="Give the adapter another name.",
        )


def _write_tensors(
    destination: Destination,
    part: _Part,
    key: FileKey | None,
    count: _Count,
    casting: Casting | None,
    threads: int | None,
) -> TensorsEntry:
    plan, reader = (
        part.plan,
        CheckpointReader(part.checkpoint if casting is None else casting.stored),
    )
    read = reader.read_into if casting is None else casting.reader(reader.read_into)
    try:
        with destination.create(part.tensors_name, plan.index.size) as out:
            headers = write_file(
                out,
                plan,
                lambda record, start, view: read(record.name, start, view),
                key=key,
                on_bytes=count,
                threads=threads,
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


def _copy(
    destination: Destination, checkpoint: Checkpoint, name: str, size: int, target: str
) -> FileEntry:
    source = LocalSource(checkpoint.directory / name)
    digest = hashlib.sha256()
    try:
        if source.size != size:
            raise CorruptError(f"{source.name} was changed while it was packed.")
        with destination.create(target, size) as out:
            for offset in range(0, size, _COPY_BYTES):
                data = source.read(offset, min(_COPY_BYTES, size - offset))
                digest.update(data)
                out.write(data)
    finally:
        source.close()
    return FileEntry(target, size, digest.hexdigest())


def _write(destination: Destination, name: str, data: bytes) -> FileEntry:
    with destination.create(name, len(data)) as out:
        out.write(data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def _refuse_inside(checkpoint: Checkpoint, dest: str) -> None:
    if "://" in dest:
        return
    source, target = checkpoint.directory.resolve(), Path(dest).resolve()
    if target.is_relative_to(source):
        raise ConfigurationError(
            f"The bundle would lie inside of the model's own directory {source}.",
            hint="Give a directory beside it.",
        )
