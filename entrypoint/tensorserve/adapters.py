"""How do a bundle's LoRA adapters reach vLLM, without a plain-text file on a disk?

vLLM reads adapters from safetensors files. So each is fetched whole, authenticated and opened
here, and put into memory (`handoff`) as such a file; beside its configuration stands a link to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tensorserve import handoff, sources
from tensorserve.checkpoint import DTYPE_LABELS
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, FileKey, read_index, read_tensor
from tensorserve.headers import check_headers
from tensorserve.host_memory import limit_of
from tensorserve.keys import prove_key
from tensorserve.lora import CONFIG, SAFETENSORS, WEIGHTS, adapter_file, adapters_of, rank_of
from tensorserve.manifest import Manifest, TensorsEntry, check_index
from tensorserve.opening import access_for, key_for
from tensorserve.settings import Settings
from tensorserve.sources import Access
from tensorserve.sources.parts import Filling, ReadsParts
from tensorserve.verification import Verification, verification_of

_THREADS = 4


@dataclass(frozen=True)
class Adapter:
    """An adapter that vLLM can load: its name, its directory, its largest rank."""

    name: str
    directory: Path
    rank: int


def hold_adapters(
    bundle_uri: str, model_dir: Path, settings: Settings, manifest: Manifest | None
) -> tuple[Adapter, ...]:
    """Put the adapters of the bundle into this process's memory, where they stay as long as it.

    Their configurations are in `model_dir` already. Raises CorruptError, ConfigurationError (too
    large for TENSORSERVE_HOST_MEMORY_LIMIT) and the sources' errors.
    """
    names = adapters_of(manifest)
    if manifest is None or not names:
        return ()
    entries = {name: manifest.tensors_files[adapter_file(name, WEIGHTS)] for name in names}
    total = sum(entry.size for entry in entries.values())
    if total > (limit := limit_of(settings)):
        raise ConfigurationError(
            f"The bundle's adapters take {total} bytes of memory, TENSORSERVE_HOST_MEMORY_LIMIT "
            f"is {limit}.",
            hint="Raise it (they stay in memory), or set TENSORSERVE_VLLM_ENABLE_LORA=false to "
            "serve the model without them.",
        )
    access, key = access_for(settings), key_for(settings)

    def hold(name: str) -> Adapter:
        config = model_dir / adapter_file(name, CONFIG)
        if not config.is_file():
            raise CorruptError(f"Adapter {name!r} of the bundle has no {CONFIG}.")
        rank = rank_of(config.read_bytes(), str(config))
        file = adapter_file(name, WEIGHTS)
        # Small: a plain one's digests are compared wherever it comes from.
        rule = verification_of(
            settings.verify, manifest, file, encrypted=key is not None, pinned=False
        )
        image = _open_twice(bundle_uri, file, entries[name], manifest, access, key, rule)
        link = config.with_name(SAFETENSORS)
        link.symlink_to(handoff.publish(image, f"adapter-{name}"[:200]))
        return Adapter(name, config.parent, rank)

    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(hold, names))


def _open_twice(
    bundle_uri: str,
    file: str,
    entry: TensorsEntry,
    manifest: Manifest,
    access: Access,
    key: FileKey | None,
    rule: Verification,
) -> bytearray:
    """What looks damaged is fetched once more: on the wire, or at rest?"""
    uri = sources.join(bundle_uri, file)
    for last in (False, True):
        source = sources.open_source(uri, access)
        try:
            if source.size != entry.size:
                raise CorruptError(
                    f"{source.name} is {source.size} bytes, the manifest says {entry.size}.",
                    hint="It was replaced or damaged. Upload the bundle again.",
                )
            content = _Fetched(source.name, source.read(0, source.size))
        finally:
            source.close()
        try:
            index = read_index(content)
            check_index(manifest, file, index)
            prove_key(content, index, key)
            return _safetensors(content, index, key, entry, rule)
        except CorruptError:
            if last or not source.remote:
                raise
    raise AssertionError("unreachable")


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
    header: dict[str, object] = {}
    at = 0
    for record in index.tensors:
        header[record.name] = {
            "dtype": DTYPE_LABELS[record.dtype],
            "shape": list(record.shape),
            "data_offsets": [at, at + record.length],
        }
        at += record.length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    image = bytearray(len(text).to_bytes(8, "little") + text)
    # A plain file is small, and nothing else looks at its data.
    verify = rule.digests or not index.encrypted
    digests = entry.digests or (None,) * len(index.tensors)
    for record, expected in zip(index.tensors, digests, strict=True):
        image += read_tensor(content, record, index, key, verify=verify, expected=expected)
    return image


class _Fetched(ReadsParts):
    """A whole file in memory, as a source."""

    remote = False
    pinned = True
    version: str | None = None

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.size, self._data = name, len(data), data

    def read_parts(
        self,
        offset: int,
        lengths: Sequence[int],
        memory: Callable[[int], memoryview],
        on_part: Callable[[int], bool],
    ) -> None:
        """See `Source`."""
        filling = Filling(lengths, memory, on_part)
        stop = self.within(offset, filling)
        filling.take(self._data[offset:stop])

    def close(self) -> None:
        """Nothing to free."""
