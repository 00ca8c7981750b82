"""What is the SHA-256 of a whole file, however large, wherever it is?"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tensorserve import sources
from tensorserve.errors import CorruptError
from tensorserve.sources import Access, Source

_STEP = 8 * 1024**2
_MOST_THREADS = 8
# (bytes read, bytes in all)
Progress = Callable[[int, int], None]


def sha256_of(
    uri: str, access: Access, *, version: str | None = None, progress: Progress | None = None
) -> str:
    """SHA-256 (hex) of the whole file at `uri`, as `digest_of` has it.

    Raises CorruptError if `version` is given and is not the file's, and the sources' errors.
    """
    source = sources.open_source(uri, access)
    try:
        if version is not None and source.version != version:
            raise CorruptError(
                f"{source.name} was replaced while it was read.",
                hint="Try again when no other process writes to the bundle.",
            )
        return digest_of(source, progress)
    finally:
        source.close()


def digest_of(source: Source, progress: Progress | None = None) -> str:
    """SHA-256 (hex) of all of `source`. A large one is read by several requests at a time.

    Raises the sources' errors. Needs up to 9 buffers of 8 MiB.
    """
    if source.size <= _STEP:
        return hashlib.sha256(source.read(0, source.size)).hexdigest()
    digest, done = hashlib.sha256(), 0
    threads = min(_MOST_THREADS, 2 * len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="tensorserve-hash") as pool:
        ahead: deque[Future[bytes]] = deque()
        offsets = iter(range(0, source.size, _STEP))
        try:
            while True:
                while len(ahead) < threads and (offset := next(offsets, None)) is not None:
                    length = min(_STEP, source.size - offset)
                    ahead.append(pool.submit(source.read, offset, length))
                if not ahead:
                    return digest.hexdigest()
                data = ahead.popleft().result()
                digest.update(data)
                done += len(data)
                if progress is not None:
                    progress(done, source.size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
