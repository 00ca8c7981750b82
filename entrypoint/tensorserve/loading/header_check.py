"""Are a file's headers those of its manifest or, without one, the same as when they were read?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tensorserve.errors import CorruptError
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import ReplacedError, Source


def small_reads(connections: int | None) -> ThreadPoolExecutor:
    """Threads that read headers at the end of a load; `connections` as in LoadOptions."""
    return ThreadPoolExecutor(connections or DEFAULTS.header_connections, "tensorserve-headers")


def check_headers(
    source: Source,
    headers: Mapping[int, bytes],
    expected: str | None,
    *,
    connections: int | None,
) -> None:
    """Check the nonces, tags and hashes of a file as a whole.

    `headers`: {offset: header}, as they were read. `expected`: SHA-256 (hex) of all of the file's
    headers in file order, from a manifest; raises CorruptError where it differs. Without it, and
    where no version pins the file, each header is read once more; raises ReplacedError where one
    differs. A header holds its tensor's hashes and tags, so it shows that the file was replaced.
    """
    if expected is None:
        if not source.pinned:
            _check_unchanged(source, headers, connections)
        return
    found = hashlib.sha256(b"".join(headers[offset] for offset in sorted(headers)))
    if found.hexdigest() != expected:
        raise CorruptError(
            f"{source.name}: the tensors' headers are not those of the manifest.",
            hint="Tensors were exchanged for others under the same key. Copy the bundle again from "
            "where it was packed, and check who can write to this storage.",
        )


def _check_unchanged(source: Source, headers: Mapping[int, bytes], connections: int | None) -> None:
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
