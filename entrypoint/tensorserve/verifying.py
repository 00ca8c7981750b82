"""Is every byte of a bundle what was packed: tags, hashes, sizes, digests?

All of it is read, with bounded memory, and all damage is found, not only the first. What was read
is described as a manifest describes it: that is what `sign` (signing.py) writes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

from tensorserve import sources
from tensorserve.artifacts import KNOWN_NAMES
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
from tensorserve.keys import ModelKey
from tensorserve.layouts import is_rank_layout, loadable
from tensorserve.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    TensorsEntry,
    check_index,
    manifest_line,
)
from tensorserve.opening import open_manifest, open_tensors
from tensorserve.plan import SHARD_PATTERN, shard_name, split_model_uri
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, NotFoundError, Source
from tensorserve.verification import AUTO, DIGESTS, TAGS, verification_of

# Read at once, by each thread; at least one cipher chunk.
_STEP = 8 * 1024**2
_MAX_THREADS = 8
# A box can only be opened whole. Larger ones than this, which no known writer makes, take turns.
_LARGE_STEP = 64 * 1024**2
_one_at_a_time = threading.Lock()
_MAX_NAMED = 5
# What vLLM and transformers look for beside the weights, KNOWN_NAMES apart.
_READ = (".json", ".jinja", ".model", ".tiktoken")

OK, DAMAGED, UNCHECKED = "ok", "DAMAGED", "unchecked"

# (bytes of tensors checked, bytes of tensors in this file)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileResult:
    """One file: OK, DAMAGED, or UNCHECKED where nothing vouches for it."""

    name: str
    state: str
    detail: str
    tensors: tuple[str, ...] = ()
    """Every damaged tensor and why, for the terminal; `detail` names the first few."""
    entry: FileEntry | TensorsEntry | None = field(default=None, repr=False)
    """What a manifest would say of it, where it is whole."""
    sealed: TensorHeader | None = field(default=None, repr=False)
    """One of its headers, which says how it is sealed; None: it is not."""
    for_rank: bool = False
    """Whether it holds a rank's parameters: only a manifest says for which engine."""

    def __str__(self) -> str:
        lines = [f"{self.state:9}  {self.name}  {self.detail}"]
        return "\n".join(lines + [f"{'':11}{tensor}" for tensor in self.tensors])


@dataclass(frozen=True)
class Verified:
    """A bundle in which nothing is damaged."""

    manifest: Manifest | None
    results: tuple[FileResult, ...]


def verify(
    uri: str,
    access: Access,
    key: ModelKey | None,
    on_line: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    *,
    wish: str = AUTO,
    pin: str | None = None,
) -> Verified:
    """Reads the bundle (or the one .tensors file) at `uri` and checks everything that can be.

    Calls `on_line` with the result for each file as soon as it is there: a line, and below it one
    for each of several damaged tensors. `wish` and `pin` are TENSORSERVE_VERIFY and
    TENSORSERVE_MANIFEST_SHA256. Raises CorruptError at the end if anything is damaged or missing;
    WrongKeyError, a manifest's CorruptError or that of one that `wish` misses, ConfigurationError
    (no key, or a key for a plain file) and the sources' errors at once. Memory: some pieces
    of 8 MiB.
    """
    bundle, candidates = split_model_uri(uri)
    firsts = [c % 0 if SHARD_PATTERN.search(c) else c for c in candidates]
    manifest = open_manifest(bundle, access, key, firsts, pin=pin)
    single = candidates[0] if len(candidates) == 1 and not SHARD_PATTERN.search(uri) else None
    check = _Check(bundle, access, key, manifest, wish, progress)
    results: list[FileResult] = []
    for result in check.all(single, candidates):
        results.append(result)
        on_line(str(result))
    damaged = [result for result in results if result.state == DAMAGED]
    count = sum(result.name != MANIFEST for result in results)
    if damaged:
        raise CorruptError(
            f"{redact_uri(uri)}: {len(damaged)} of {count} files are damaged: "
            + "; ".join(f"{result.name}: {result.detail}" for result in damaged),
            hint="Pack or copy the bundle again.",
        )
    return Verified(manifest, tuple(results))


@dataclass(frozen=True)
class _Check:
    """What all files of a bundle are checked with."""

    bundle: str
    access: Access
    key: ModelKey | None
    manifest: Manifest | None
    wish: str
    progress: Progress | None

    def all(self, single: str | None, candidates: tuple[str, ...]) -> Iterator[FileResult]:
        """Each file, the weights first."""
        # What stands beside a single file is nobody's business here, and may be unreadable.
        listing = sources.list_names(self.bundle, self.access) if single is None else None
        manifest = self.manifest
        if single is not None:
            tensors = [single]
        elif manifest is not None:
            tensors = list(manifest.tensors_files)
        else:
            tensors = _tensors_without_manifest(self.bundle, candidates, listing, self.access)
        for name in tensors:
            yield _check_tensors(self, name)
        if single is not None:
            if manifest is not None and single in manifest.tensors_files:
                yield _manifest_result(manifest, sealed=self.key is not None)
            return
        entries = {entry.name: entry for entry in manifest.files} if manifest else {}
        for entry in entries.values():
            yield _check_file(self.bundle, entry, self.access)
        if manifest is not None or self.key is not None:
            yield _manifest_result(manifest, sealed=self.key is not None)
        for name in sorted(set(listing or ()) - {*entries, *tensors, MANIFEST}):
            why = f"not in {MANIFEST}" if manifest else f"the bundle has no {MANIFEST}"
            yield FileResult(name, UNCHECKED, why)


def _manifest_result(manifest: Manifest | None, *, sealed: bool) -> FileResult:
    """Which rule holds, and what TENSORSERVE_MANIFEST_SHA256 would be."""
    advice = (
        "`tensorserve sign` makes one that the key vouches for"
        if sealed
        else "nothing is encrypted"
    )
    if manifest is None:
        return FileResult(MANIFEST, UNCHECKED, f"there is none; {advice}")
    said = f"version {manifest.version}, {manifest_line(manifest.sha256, manifest.vouched_by)}"
    if manifest.vouched_by:
        return FileResult(MANIFEST, OK, said)
    return FileResult(MANIFEST, UNCHECKED, f"{said}; {advice}")


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
        found = describe_file(bundle, entry.name, access)
    except NotFoundError:
        return FileResult(entry.name, DAMAGED, "missing")
    if found.size != entry.size:
        detail = f"{found.size} bytes, {MANIFEST} says {entry.size}"
        return FileResult(entry.name, DAMAGED, detail)
    if found.sha256 != entry.sha256:
        return FileResult(entry.name, DAMAGED, f"its SHA-256 is not the one in {MANIFEST}")
    return FileResult(entry.name, OK, f"{entry.size} bytes, SHA-256 fits", entry=entry)


def check_files_in_place(directory: str, manifest: Manifest, *, remote_code: bool) -> None:
    """Raises CorruptError unless what vLLM reads in `directory`, a bundle on a disk, is packed.

    For a vLLM that was started without us, and reads the small files where they are. A file that
    the manifest does not name is refused where vLLM would take it; code only with `remote_code`.
    """
    access = Access()
    results = [_check_file(directory, entry, access) for entry in manifest.files]
    wrong = {result.name: result.detail for result in results if result.state == DAMAGED}
    named = {entry.name for entry in manifest.files} | {MANIFEST}
    for name in sources.list_names(directory, access) or ():
        hidden = any(part.startswith(".") for part in name.split("/"))
        read = name in KNOWN_NAMES or (name.endswith(_READ) and not name.endswith(".index.json"))
        if name not in named and not hidden and (read or (remote_code and name.endswith(".py"))):
            wrong[name] = f"not in {MANIFEST}"
    if wrong:
        said = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:_MAX_NAMED])
        raise CorruptError(
            f"{directory} has files that were not packed so: {said}.",
            hint="Copy the whole bundle again. If the files are meant, pack the model again.",
        )


def describe_file(bundle: str, name: str, access: Access) -> FileEntry:
    """A small file as a manifest describes it. Raises the sources' errors."""
    source = sources.open_source(sources.join(bundle, name), access)
    digest = hashlib.sha256()
    try:
        for offset in range(0, source.size, _STEP):
            digest.update(source.read(offset, min(_STEP, source.size - offset)))
        return FileEntry(name, source.size, digest.hexdigest())
    finally:
        source.close()


def _check_tensors(check: _Check, name: str) -> FileResult:
    manifest = check.manifest
    if manifest is not None and not manifest.vouched_by and name not in manifest.tensors_files:
        manifest = None  # another file beside the bundle's own
    try:
        opened = open_tensors(sources.join(check.bundle, name), check.access, check.key)
    except NotFoundError:
        return FileResult(name, DAMAGED, "missing")
    except WrongKeyError:
        raise  # nothing more can be said about the bundle
    except CorruptError as error:
        return FileResult(name, DAMAGED, error.message)
    index = opened.index
    entry = manifest.tensors_files.get(name) if manifest else None
    try:
        rule = verification_of(
            check.wish, manifest, name, encrypted=index.encrypted, pinned=opened.source.pinned
        )
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
        expected = entry.digests if entry else None
        contents = _check_contents(opened.source, index, check.key, expected, check.progress)
    finally:
        opened.source.close()
    damaged = contents.damaged
    if damaged:
        named = ", ".join(repr(tensor) for tensor in list(damaged)[:_MAX_NAMED])
        more = f" and {len(damaged) - _MAX_NAMED} more" if len(damaged) > _MAX_NAMED else ""
        first = next(iter(damaged.values()))
        problems.append(f"{len(damaged)} of {len(index.tensors)} tensors: {named}{more} ({first})")
    elif entry is not None and contents.headers_sha256 != entry.headers_sha256:
        problems.append(
            f"the tensors' headers (hashes, nonces, tags) are not the ones in {MANIFEST}: "
            "tensors were exchanged for others under the same key"
        )
    if contents.undigested and rule.mode == DIGESTS:
        problems.append(
            f"{contents.undigested} of {len(index.tensors)} tensors are sealed, but neither an "
            f"authenticated {MANIFEST} nor a SHA-256 says which they are: they may have been "
            "exchanged for one another (TENSORSERVE_VERIFY=tags looks away)"
        )
    if problems:
        every = tuple(f"{tensor!r}: {why}" for tensor, why in damaged.items())
        return FileResult(name, DAMAGED, "; ".join(problems), every if len(every) > 1 else ())
    fits = "the tags alone" if rule.mode == TAGS and contents.undigested else "every digest fits"
    secured = f"every chunk authenticated, {fits}" if index.encrypted else f"{fits}, not encrypted"
    size = f"{index.data_bytes / 1e6:.1f} MB"
    found = TensorsEntry(
        size=index.size,
        tensors=len(index.tensors),
        data_bytes=index.data_bytes,
        index_sha256=index.digest,
        headers_sha256=contents.headers_sha256,
        digests=contents.digests if index.encrypted else None,
    )
    return FileResult(
        name,
        OK,
        f"{len(index.tensors)} tensors, {size}, {secured}",
        entry=found,
        sealed=contents.sealed,
        for_rank=is_rank_layout(index),
    )


@dataclass
class _Contents:
    """What was found in a file."""

    damaged: dict[str, str] = field(default_factory=dict)  # tensor: why
    headers_sha256: str = ""  # of all headers in file order
    digests: tuple[bytes, ...] = ()  # of all tensors in file order
    undigested: int = 0  # tensors with nothing to compare their digest with
    sealed: TensorHeader | None = None  # of the first that is


@dataclass(frozen=True)
class _Tensor:
    """What was found of a tensor."""

    header: bytes
    parsed: TensorHeader | None = None
    digest: bytes = b""
    problem: str | None = None


def _check_contents(
    source: Source,
    index: FileIndex,
    key: FileKey | None,
    expected: tuple[bytes, ...] | None,
    progress: Progress | None,
) -> _Contents:
    found = _Contents()
    headers = hashlib.sha256()
    digests = []
    done = 0
    # A manifest of another file has another number.
    fits = expected is not None and len(expected) == len(index.tensors)
    wanted = expected if expected and fits else (None,) * len(index.tensors)
    threads = min(_MAX_THREADS, 2 * len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="tensorserve-verify") as pool:
        stopped = threading.Event()
        jobs = pool.map(
            lambda record, digest: _check_tensor(source, index, record, key, digest, stopped),
            index.tensors,
            wanted,
        )
        try:
            for record, digest, tensor in zip(index.tensors, wanted, jobs, strict=True):
                headers.update(tensor.header)
                digests.append(tensor.digest)
                if tensor.problem is not None:
                    found.damaged[record.name] = tensor.problem
                elif tensor.parsed is not None:
                    found.undigested += digest is None and tensor.parsed.sha256 is None
                    if tensor.parsed.chunks is not None:
                        found.sealed = found.sealed or tensor.parsed
                done += record.length
                if progress is not None:
                    progress(done, index.data_bytes)
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    found.headers_sha256, found.digests = headers.hexdigest(), tuple(digests)
    return found


def _check_tensor(
    source: Source,
    index: FileIndex,
    record: TensorRecord,
    key: FileKey | None,
    expected: bytes | None,
    stopped: threading.Event,
) -> _Tensor:
    """What looks damaged is read a second time: the wire."""
    problem: str | None = None
    for _ in range(2):
        header = source.read(record.header_offset, record.header_length)
        try:
            parsed = parse_header(
                record, header, encrypted=index.encrypted, source_name=source.name
            )
            check = HashCheck(parsed, expected)
            _check_data(source, parsed, key, check, stopped)
            if not stopped.is_set():
                check.compare()
        except CorruptError as error:
            problem = error.message
        else:
            return _Tensor(header, parsed, check.digest())
    return _Tensor(header, problem=problem)


def _check_data(
    source: Source,
    header: TensorHeader,
    key: FileKey | None,
    check: HashCheck,
    stopped: threading.Event,
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
        _check_pieces(source, header, secret, step, check, stopped)


def _check_pieces(
    source: Source,
    header: TensorHeader,
    secret: bytes,
    step: int,
    check: HashCheck,
    stopped: threading.Event,
) -> None:
    record, chunks = header.record, header.chunks
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
