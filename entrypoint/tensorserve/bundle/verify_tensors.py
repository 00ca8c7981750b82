"""Are all tensors of one .tensors file intact: every chunk's tag and every tensor's digest?"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field

from tensorserve.errors import CorruptError
from tensorserve.format import (
    FileIndex,
    FileKey,
    HashCheck,
    TensorHeader,
    TensorRecord,
    open_tensor_chunk,
    parse_header,
)
from tensorserve.sources import Source

# Bytes that each thread reads at once; at least one chunk of the cipher.
_STEP = 8 * 1024**2
_MAX_THREADS = 8
# A chunk can only be opened as a whole. Larger ones, which no known writer makes, take turns.
_LARGE_STEP = 64 * 1024**2
_one_at_a_time = threading.Lock()

# (bytes of tensors checked, bytes of tensors in this file)
Progress = Callable[[int, int], None]


@dataclass
class Contents:
    """What was found in one file."""

    damaged: dict[str, str] = field(default_factory=dict)  # {tensor name: problem}
    headers_sha256: str = ""  # of all headers in file order
    digests: tuple[bytes, ...] = ()  # SHA-256 of each tensor in file order
    undigested: int = 0  # number of tensors without a digest to compare with
    sealed: TensorHeader | None = None  # of the first encrypted tensor


@dataclass(frozen=True)
class _Tensor:
    """What was found in one tensor."""

    header: bytes
    parsed: TensorHeader | None = None
    digest: bytes = b""
    problem: str | None = None


def check_contents(
    source: Source,
    index: FileIndex,
    key: FileKey | None,
    expected: tuple[bytes, ...] | None,
    progress: Progress | None,
) -> Contents:
    """Reads, decrypts and hashes all tensors of an open file, up to 8 at a time.

    `expected` has the SHA-256 of each tensor in file order, if the manifest has them. Damage is
    part of the result; raises the sources' errors.
    """
    found = Contents()
    headers = hashlib.sha256()
    digests = []
    done = 0
    # The manifest may be of another file, with another number of tensors.
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
    """Checks one tensor. A damaged one is read again, since the damage may be in transit."""
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
    """Decrypts and hashes the tensor piece by piece, until it ends or `stopped` is set."""
    record, chunks = header.record, header.chunks
    secret = b""
    step = _STEP
    if chunks is not None:
        assert key is not None  # prove_key raised otherwise
        secret = key.for_header(header)
        # Pieces of whole chunks. A tensor in a single chunk is one piece, whatever its size.
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
