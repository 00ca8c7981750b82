"""Is every byte of a bundle what was packed: tags, hashes, sizes, digests?

All of it is read, with bounded memory, and all damage is found, not only the first.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from tensorserve import sources
from tensorserve.errors import CorruptError, WrongKeyError
from tensorserve.fingerprint import MOST_RANKS
from tensorserve.format import (
    FileIndex,
    FileKey,
    HashCheck,
    TensorHeader,
    TensorRecord,
    open_tensor_chunk,
    parse_header,
)
from tensorserve.layouts import loadable
from tensorserve.manifest import MANIFEST, FileEntry, Manifest, check_index, read_manifest
from tensorserve.opening import open_tensors
from tensorserve.plan import SHARD_PATTERN, shard_name, split_model_uri
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, NotFoundError, Source

# Read at once, by each thread; at least one cipher chunk.
_STEP = 8 * 1024**2
_MAX_THREADS = 8
# A box can only be opened whole. Larger ones than this, which no known writer makes, take turns.
_LARGE_STEP = 64 * 1024**2
_one_at_a_time = threading.Lock()
_MAX_NAMED = 5

OK, DAMAGED, UNCHECKED = "ok", "DAMAGED", "unchecked"

# (bytes of tensors checked, bytes of tensors in this file)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileResult:
    """One file: OK, DAMAGED, or UNCHECKED where no manifest vouches for it."""

    name: str
    state: str
    detail: str
    tensors: tuple[str, ...] = ()
    """Every damaged tensor and why, for the terminal; `detail` names the first few."""

    def __str__(self) -> str:
        lines = [f"{self.state:9}  {self.name}  {self.detail}"]
        return "\n".join(lines + [f"{'':11}{tensor}" for tensor in self.tensors])


def verify(
    uri: str,
    access: Access,
    key: FileKey | None,
    on_line: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> list[FileResult]:
    """Reads the bundle (or the one .tensors file) at `uri` and checks everything that can be.

    Calls `on_line` with the result for each file as soon as it is there: a line, and below it one
    for each of several damaged tensors. Raises CorruptError at the end if anything is damaged
    or missing; WrongKeyError, ConfigurationError (no key, or a key for a plain file) and the
    sources' errors at once. Memory: some pieces of 8 MiB.
    """
    bundle, candidates = split_model_uri(uri)
    manifest = read_manifest(bundle, access)
    single = candidates[0] if len(candidates) == 1 and not SHARD_PATTERN.search(uri) else None
    results: list[FileResult] = []
    for result in _check_all(bundle, single, candidates, manifest, access, key, progress):
        results.append(result)
        on_line(str(result))
    damaged = [result for result in results if result.state == DAMAGED]
    if damaged:
        raise CorruptError(
            f"{redact_uri(uri)}: {len(damaged)} of {len(results)} files are damaged: "
            + "; ".join(f"{result.name}: {result.detail}" for result in damaged),
            hint="Pack or copy the bundle again.",
        )
    return results


def _check_all(
    bundle: str,
    single: str | None,
    candidates: tuple[str, ...],
    manifest: Manifest | None,
    access: Access,
    key: FileKey | None,
    progress: Progress | None,
) -> Iterator[FileResult]:
    # What stands beside a single file is nobody's business here, and may be unreadable.
    listing = sources.list_names(bundle, access) if single is None else None
    if single is not None:
        tensors = [single]
        if manifest is not None and single not in manifest.tensors_files:
            manifest = None  # another file beside the bundle's own
    elif manifest is not None:
        tensors = list(manifest.tensors_files)
    else:
        tensors = _tensors_without_manifest(bundle, candidates, listing, access)
    for name in tensors:
        yield _check_tensors(bundle, name, manifest, access, key, progress)
    if single is not None:
        return
    entries = {entry.name: entry for entry in manifest.files} if manifest else {}
    for entry in entries.values():
        yield _check_file(bundle, entry, access)
    for name in sorted(set(listing or ()) - {*entries, *tensors, MANIFEST}):
        why = f"not in {MANIFEST}" if manifest else f"the bundle has no {MANIFEST}"
        yield FileResult(name, UNCHECKED, why)


def _tensors_without_manifest(
    bundle: str, candidates: tuple[str, ...], listing: dict[str, int] | None, access: Access
) -> list[str]:
    if listing is not None:
        found = sorted(name for name in listing if name.endswith(".tensors"))
    else:
        # HTTP cannot list: ask for each name until one is missing.
        found = []
        for candidate in candidates:
            rank = 0
            while not found or rank:
                name = shard_name(candidate, rank)
                try:
                    sources.open_source(sources.join(bundle, name), access).close()
                except NotFoundError:
                    break
                found.append(name)
                if name == candidate or rank == MOST_RANKS:
                    break
                rank += 1
    if not found:
        raise NotFoundError(
            f"{redact_uri(bundle)} has neither a {MANIFEST} nor a .tensors file.",
            hint="Give the directory of a bundle, or a .tensors file.",
        )
    return found


def _check_file(bundle: str, entry: FileEntry, access: Access) -> FileResult:
    try:
        source = sources.open_source(sources.join(bundle, entry.name), access)
    except NotFoundError:
        return FileResult(entry.name, DAMAGED, "missing")
    digest = hashlib.sha256()
    try:
        if source.size != entry.size:
            detail = f"{source.size} bytes, {MANIFEST} says {entry.size}"
            return FileResult(entry.name, DAMAGED, detail)
        for offset in range(0, source.size, _STEP):
            digest.update(source.read(offset, min(_STEP, source.size - offset)))
    finally:
        source.close()
    if digest.hexdigest() != entry.sha256:
        return FileResult(entry.name, DAMAGED, f"its SHA-256 is not the one in {MANIFEST}")
    return FileResult(entry.name, OK, f"{entry.size} bytes, SHA-256 fits")


def _check_tensors(
    bundle: str,
    name: str,
    manifest: Manifest | None,
    access: Access,
    key: FileKey | None,
    progress: Progress | None,
) -> FileResult:
    try:
        opened = open_tensors(sources.join(bundle, name), access, key)
    except NotFoundError:
        return FileResult(name, DAMAGED, "missing")
    except WrongKeyError:
        raise  # nothing more can be said about the bundle
    except CorruptError as error:
        return FileResult(name, DAMAGED, error.message)
    index = opened.index
    try:
        problems = []
        try:
            loadable(index)
        except CorruptError as error:
            problems.append(error.message)
        if manifest is not None:
            try:
                check_index(manifest, name, index)
            except CorruptError as error:
                problems.append(error.message)
        damaged, headers = _check_contents(opened.source, index, key, progress)
        if damaged:
            named = ", ".join(repr(tensor) for tensor in list(damaged)[:_MAX_NAMED])
            more = f" and {len(damaged) - _MAX_NAMED} more" if len(damaged) > _MAX_NAMED else ""
            first = next(iter(damaged.values()))
            problems.append(
                f"{len(damaged)} of {len(index.tensors)} tensors: {named}{more} ({first})"
            )
        elif manifest is not None and headers != manifest.tensors_files[name].headers_sha256:
            problems.append(
                f"the tensors' headers (hashes, nonces, tags) are not the ones in {MANIFEST}: "
                "tensors were exchanged for others under the same key"
            )
    finally:
        opened.source.close()
    if problems:
        every = tuple(f"{tensor!r}: {why}" for tensor, why in damaged.items())
        return FileResult(name, DAMAGED, "; ".join(problems), every if len(every) > 1 else ())
    secured = "every chunk authenticated" if index.encrypted else "every hash fits, not encrypted"
    size = f"{index.data_bytes / 1e6:.1f} MB"
    return FileResult(name, OK, f"{len(index.tensors)} tensors, {size}, {secured}")


def _check_contents(
    source: Source, index: FileIndex, key: FileKey | None, progress: Progress | None
) -> tuple[dict[str, str], str]:
    """({damaged tensor: why}, SHA-256 of all headers in file order)."""
    damaged: dict[str, str] = {}
    headers = hashlib.sha256()
    done = 0
    threads = min(_MAX_THREADS, 2 * len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="tensorserve-verify") as pool:
        stopped = threading.Event()
        jobs = pool.map(
            lambda record: _check_tensor(source, index, record, key, stopped), index.tensors
        )
        try:
            for record, (header, problem) in zip(index.tensors, jobs, strict=True):
                headers.update(header)
                if problem is not None:
                    damaged[record.name] = problem
                done += record.length
                if progress is not None:
                    progress(done, index.data_bytes)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return damaged, headers.hexdigest()


def _check_tensor(
    source: Source,
    index: FileIndex,
    record: TensorRecord,
    key: FileKey | None,
    stopped: threading.Event,
) -> tuple[bytes, str | None]:
    """(the header's bytes, what is wrong). What looks damaged is read a second time: the wire."""
    problem: str | None = None
    for _ in range(2):
        header = source.read(record.header_offset, record.header_length)
        try:
            parsed = parse_header(
                record, header, encrypted=index.encrypted, source_name=source.name
            )
            _check_data(source, parsed, key, stopped)
        except CorruptError as error:
            problem = error.message
        else:
            return header, None
    return header, problem


def _check_data(
    source: Source, header: TensorHeader, key: FileKey | None, stopped: threading.Event
) -> None:
    """Opens and hashes the tensor piece by piece, until nobody wants to know any more."""
    record, chunks = header.record, header.chunks
    secret = b""
    step = _STEP
    if chunks is not None:
        assert key is not None  # prove_key saw to it
        secret = key.for_header(header)
        # Whole chunks; a tensor in one box (no writer makes large ones) is one piece.
        size = record.length if chunks.count == 1 else chunks.chunk_size
        step = max(size, _STEP // size * size)
    with _one_at_a_time if min(step, record.length) > _LARGE_STEP else nullcontext():
        _check_pieces(source, header, secret, step, stopped)


def _check_pieces(
    source: Source, header: TensorHeader, secret: bytes, step: int, stopped: threading.Event
) -> None:
    record, chunks = header.record, header.chunks
    check = HashCheck(header)
    buffer = memoryview(bytearray(min(step, record.length)))
    for start in range(0, record.length, step):
        if stopped.is_set():
            return
        piece = buffer[: min(step, record.length - start)]
        source.read_into(record.data_offset + start, piece)
        if chunks is not None:
            first = start // chunks.chunk_size if chunks.count > 1 else 0
            for number in range(first, chunks.count):
                begin, stop = chunks.chunk_bounds(number, record.length)
                if begin >= start + len(piece):
                    break
                box = piece[begin - start : stop - start]
                open_tensor_chunk(header, secret, number, box, box)
        check.update(piece)
    check.finish()
