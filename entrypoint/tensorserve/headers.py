"""Do a file's headers say what they should: what its manifest names, or what they said before?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tensorserve.errors import CorruptError
from tensorserve.sources import ReplacedError, Source

# Connections that read small pieces at the end of a load.
_AT_ONCE = 16


def small_reads(connections: int | None) -> ThreadPoolExecutor:
    """Threads that read headers at the end of a load; `connections` as in LoadOptions."""
    return ThreadPoolExecutor(connections or _AT_ONCE, "tensorserve-headers")


def check_headers(
    source: Source,
    headers: Mapping[int, bytes],
    expected: str | None,
    *,
    connections: int | None,
) -> None:
    """Check nonces, tags and hashes of a file as a whole: `headers`, by offset, as they were read.

    `expected`: SHA-256 (hex) of all of the file's headers in file order, from a manifest; another
    one raises CorruptError. Without it, and where no version pins the file, each of `headers` is
    read once more: another one raises ReplacedError. A header holds its tensor's hashes and tags,
    so that it tells a file that was replaced during the load.
    """
    if expected is None:
        if not source.pinned:
            _check_still(source, headers, connections)
        return
    found = hashlib.sha256(b"".join(headers[offset] for offset in sorted(headers)))
    if found.hexdigest() != expected:
        raise CorruptError(
            f"{source.name}: the tensors' headers are not those of the manifest.",
            hint="Tensors were exchanged for others under the same key. Pack it again.",
        )


def _check_still(source: Source, headers: Mapping[int, bytes], connections: int | None) -> None:
    def changed(offset: int) -> bool:
        now = bytearray(len(headers[offset]))
        source.read_again(offset, memoryview(now))
        return bytes(now) != headers[offset]

    with small_reads(connections) as pool:
        if any(pool.map(changed, sorted(headers))):
            raise ReplacedError(
                f"{source.name} was replaced while it was read.",
                hint="Start again; upload models under a new name instead of over an old one.",
            )
