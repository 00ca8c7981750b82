"""How does vLLM get weights that it reads as files, without plain text on a disk?

A small .tensors file is fetched whole, authenticated and opened here, and put into memory
(`handoff`) as a safetensors file. A link to that memory is put where vLLM looks for the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tensorserve import sources
from tensorserve.bundle.key_check import prove_key
from tensorserve.bundle.manifest import Manifest, TensorsEntry, check_index
from tensorserve.bundle.stand_ins import entry_of, header_of
from tensorserve.bundle.trust import Verification, verification_of
from tensorserve.config.access import access_for, key_for
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, FileKey, read_index, read_tensor
from tensorserve.launch import handoff
from tensorserve.launch.memory_budget import limit_of
from tensorserve.loading.header_check import check_headers
from tensorserve.sources import Access, Filling, Source


@dataclass(frozen=True)
class Holder:
    """Holds files of one bundle."""

    bundle_uri: str
    settings: Settings
    manifest: Manifest
    access: Access
    key: FileKey | None

    def hold(self, file: str, link: Path) -> None:
        """Put `file` of the bundle into this process's memory, and `link` where vLLM looks.

        It stays there as long as this process. Raises CorruptError and the sources' errors.
        """
        link.symlink_to(handoff.publish(self.image(file), "weights"))

    def image(self, file: str) -> bytearray:
        """`file` of the bundle, fetched, authenticated and opened, as a safetensors file.

        Raises CorruptError and the sources' errors.
        """
        # Small: a plain one's digests are compared wherever it comes from.
        rule = verification_of(
            self.settings.verify,
            self.manifest,
            file,
            encrypted=self.key is not None,
            pinned=False,
        )
        return self._open_twice(file, self.manifest.tensors_files[file], rule)

    def _open_twice(self, file: str, entry: TensorsEntry, rule: Verification) -> bytearray:
        """Fetch again once where it looks damaged: the damage may be of the transfer."""
        uri = sources.join(self.bundle_uri, file)
        for last in (False, True):
            source = sources.open_source(uri, self.access)
            try:
                if source.size != entry.size:
                    raise CorruptError(
                        f"{source.name} is {source.size} bytes, the manifest says {entry.size}.",
                        hint="It was replaced or damaged. Upload the bundle again.",
                    )
                content = _Fetched.of(source)
            finally:
                source.close()
            try:
                index = read_index(content)
                check_index(self.manifest, file, index)
                prove_key(content, index, self.key)
                return _safetensors(content, index, self.key, entry, rule)
            except CorruptError:
                if last or not source.remote:
                    raise
        raise AssertionError("unreachable")


def holder_of(bundle_uri: str, settings: Settings, manifest: Manifest) -> Holder:
    """The holder for the bundle at `bundle_uri`, as `settings` say."""
    return Holder(bundle_uri, settings, manifest, access_for(settings), key_for(settings))


def check_room(entries: Iterable[TensorsEntry], settings: Settings, what: str, hint: str) -> None:
    """Raises ConfigurationError where they are larger than TENSORSERVE_HOST_MEMORY_LIMIT."""
    total = sum(entry.size for entry in entries)
    if total > (limit := limit_of(settings)):
        raise ConfigurationError(
            f"The bundle's {what} take {total} bytes of memory, TENSORSERVE_HOST_MEMORY_LIMIT "
            f"is {limit}.",
            hint=hint,
        )


def _safetensors(
    content: _Fetched,
    index: FileIndex,
    key: FileKey | None,
    entry: TensorsEntry,
    rule: Verification,
) -> bytearray:
    """The tensors as a safetensors file. Raises CorruptError for what is not as it was packed."""
    headers = {
        record.header_offset: content.read(record.header_offset, record.header_length)
        for record in index.tensors
    }
    check_headers(content, headers, entry.headers_sha256, connections=1)
    image = bytearray(
        header_of({r.name: entry_of(r.dtype, r.shape, r.length) for r in index.tensors})
    )
    # A plain file is small, and nothing else looks at its data.
    verify = rule.digests or not index.encrypted
    digests = entry.digests or (None,) * len(index.tensors)
    for record, expected in zip(index.tensors, digests, strict=True):
        image += read_tensor(content, record, index, key, verify=verify, expected=expected)
    return image


class _Fetched(Source):
    """A whole file in memory, as a source."""

    remote = False
    pinned = True
    version: str | None = None

    def __init__(self, name: str, data: memoryview) -> None:
        self.name, self.size, self._data = name, len(data), data

    @classmethod
    def of(cls, source: Source) -> _Fetched:
        """Read `source` whole. Raises its errors.

        Neither clearing nor copying its memory keeps other threads waiting for the interpreter:
        adapters are fetched beside the API server's event loop.
        """
        if not source.size:
            return cls(source.name, memoryview(b""))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        data = memoryview(mmap.mmap(-1, source.size, flags=flags))
        source.read_into(0, data)
        return cls(source.name, data)

    def read_parts(self, offset: int, parts: Filling) -> None:
        """See `Source`."""
        stop = self.end_of(offset, parts)
        parts.take(self._data[offset:stop])

    def close(self) -> None:
        """Nothing to free."""
