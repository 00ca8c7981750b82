"""How does a Hugging Face directory become a bundle: tensors, small files, manifest?

Nothing is unpickled, and in layout `hf` no model code runs: tensors go from safetensors to .tensors
as bytes, one at a time, sealed on the way. There is no plain-text copy and, for S3, none on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tensorserve import __version__
from tensorserve.casting import Casting
from tensorserve.checkpoint import Checkpoint, read_checkpoint
from tensorserve.destinations import Destination, open_destination
from tensorserve.engine_parameters import engine_parameters
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError, UsageError
from tensorserve.fingerprint import HF, VLLM
from tensorserve.format import (
    CHUNK_BYTES,
    FileKey,
    PasswordHash,
    fresh_password_hash,
    plan_file,
    write_file,
)
from tensorserve.keys import ModelKey, parse_key, parse_passphrase
from tensorserve.lora import WEIGHTS, adapter_file
from tensorserve.manifest import (
    CIPHER,
    KEY,
    MANIFEST,
    Encryption,
    FileEntry,
    Manifest,
    TensorsEntry,
    manifest_line,
    model_files,
)
from tensorserve.packing_sources import TensorsSource, from_checkpoint
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.sources.local import LocalSource

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
    ranks: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    adapters: tuple[str, ...]
    key_origin: str | None  # None: not encrypted
    manifest_sha256: str
    seconds: float

    def __str__(self) -> str:
        sealed = f"encrypted, key from {self.key_origin}" if self.key_origin else "NOT ENCRYPTED"
        shards = f" in {self.ranks} files" if self.ranks > 1 else ""
        lines = [
            f"{self.destination}: {self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB{shards}, "
            f"{sealed}",
            f"  with {', '.join(self.files)}",
        ]
        if self.adapters:
            lines.append(f"  adapters: {', '.join(self.adapters)}")
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        vouched_by = KEY if self.key_origin else None
        lines.append(f"  {MANIFEST}: {manifest_line(self.manifest_sha256, vouched_by)}")
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
    layout: str = HF,
    tensor_parallel_size: int = 1,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackResult:
    """Packs `src` (a Hugging Face directory, or one safetensors file in one) into a bundle.

    `dest` is a directory or s3://bucket/prefix; `overwrite` lets a bundle there be replaced. With a
    key or a passphrase (not both) the tensors are encrypted, those of `adapters` (lora.py) as well.
    `dtype` converts the model's floating-point tensors (casting.py); `threads` bounds how many
    encrypt. Memory: three of the largest tensors, four parts of 16 MiB for S3. On any error,
    KeyboardInterrupt included, what was written is removed. Raises ConfigurationError for an unfit
    source, destination or key, CorruptError for a damaged source, and the destination's errors.

    `layout` "vllm" writes the parameters of `tensor_parallel_size` ranks as vLLM holds them
    (engine_parameters.py), which then all are in memory.
    """
    started = time.monotonic()
    if layout == HF and tensor_parallel_size > 1:
        raise ConfigurationError("Only layout 'vllm' has a file for each rank.")
    if key is not None and passphrase is not None:
        raise ConfigurationError("Both a key and a passphrase are given.", hint="Give one of them.")
    opened_by: ModelKey | None = None
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
    folders = {"": checkpoint} | {
        adapter_file(name, ""): adapter for name, adapter in sorted((adapters or {}).items())
    }
    _refuse_twice(model_files(tensor_parallel_size), folders)
    needed = sum(_size(one) for one in folders.values()) + _SPARE_BYTES
    # Before a model is built in vain.
    destination = open_destination(dest, access, overwrite=overwrite, needed=needed)
    try:
        with ExitStack() as stack:
            fingerprint, ranks = None, [from_checkpoint(checkpoint, casting)]
            if layout == VLLM:
                engine = engine_parameters(src, dtype, tensor_parallel_size)
                fingerprint, ranks = stack.enter_context(engine)
            named = dict(zip(model_files(len(ranks)), ranks, strict=True)) | {
                folder + WEIGHTS: from_checkpoint(one) for folder, one in folders.items() if folder
            }
            files = [
                _File(name, source, opened_by is not None, derivation)
                for name, source in named.items()
            ]
            count = _Count(sum(file.plan.index.data_bytes for file in files), progress)
            # The largest and likeliest to fail first; what makes it a bundle last.
            tensors = {
                file.name: _write_tensors(destination, file, opened_by, count, threads)
                for file in files
            }
        small = tuple(
            _write(destination, name, casting.config())
            if casting is not None and folder + name == "config.json"
            else _copy(destination, one, name, size, folder + name)
            for folder, one in folders.items()
            for name, size in one.files.items()
        )
        manifest = Manifest(
            files=small,
            tensors_files=tensors,
            encryption=None
            if opened_by is None
            else Encryption(CIPHER, CHUNK_BYTES, "key" if passphrase is None else "passphrase"),
            made_by={"tensorserve": __version__},
            fingerprint=fingerprint,
        ).to_json(opened_by, derivation)
        written = _write(destination, MANIFEST, manifest)
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
        tensors=sum(len(file.plan.index.tensors) for file in files),
        data_bytes=count.whole,
        ranks=len(ranks),
        files=tuple(checkpoint.files),
        left_out=tuple(folder + name for folder, one in folders.items() for name in one.left_out),
        adapters=tuple(sorted(adapters or ())),
        key_origin=opened_by.origin if opened_by else None,
        manifest_sha256=written.sha256,
        seconds=time.monotonic() - started,
    )


def with_suffix(dest: str, model: str, suffix: str) -> str:
    """`dest`/vllm/<model>/<suffix>, as vLLM's own script lays out its models."""
    for part in (model, suffix):
        if not part.strip("/.") or part != part.strip("/") or ".." in part.split("/"):
            raise UsageError(f"--suffix: {part!r} cannot be part of a path.")
    return f"{dest.rstrip('/')}/vllm/{model}/{suffix}"


class _File:
    """A .tensors file to be written."""

    def __init__(
        self, name: str, source: TensorsSource, sealed: bool, derivation: PasswordHash | None
    ) -> None:
        self.name, self.source = name, source
        self.plan = plan_file(source.specs, encrypted=sealed, derivation=derivation)


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


def _size(checkpoint: Checkpoint) -> int:
    """Bytes that it will take, about: headers and tags come to less than what is spared."""
    return sum(t.length for t in checkpoint.tensors) + sum(checkpoint.files.values())


def _refuse_twice(model: tuple[str, ...], folders: Mapping[str, Checkpoint]) -> None:
    names = [*model, *(folder + WEIGHTS for folder in folders if folder)]
    names += [folder + name for folder, one in folders.items() for name in one.files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"The model's own directory has a file that the adapter would take: {twice[0]}.",
            hint="Give the adapter another name.",
        )


def _write_tensors(
    destination: Destination, file: _File, key: FileKey | None, count: _Count, threads: int | None
) -> TensorsEntry:
    index = file.plan.index
    with file.source.reading() as read, destination.create(file.name, index.size) as out:
        written = write_file(
            out,
            file.plan,
            lambda record, start, view: read(record.name, start, view),
            key=key,
            on_bytes=count,
            threads=threads,
        )
    return TensorsEntry(
        size=index.size,
        tensors=len(index.tensors),
        data_bytes=index.data_bytes,
        index_sha256=index.digest,
        headers_sha256=written.headers_sha256,
        digests=written.tensors if key is not None else None,
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
