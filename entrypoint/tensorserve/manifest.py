"""What does a bundle's manifest.json say, and does the bundle agree with it?

The format is described in docs/bundle-format.md. A manifest comes from the same untrusted place as
the bundle: every type and name in it is checked before use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tensorserve import sources
from tensorserve.bounded_json import read_json
from tensorserve.bundle_names import leaves_bundle
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.fingerprint import HF, LAYOUTS, VLLM, Fingerprint
from tensorserve.format import FileIndex
from tensorserve.sources import Access, NotFoundError

MANIFEST = "manifest.json"
SINGLE, SHARDS = "model.tensors", "model-rank-%03d.tensors"
FORMAT = "tensorserve-bundle"
VERSION = 1
# Some 100,000 tensors' digests. What JSON says in a byte takes up to 25 in memory.
MAX_MANIFEST_BYTES = 16 * 1024**2
# Of one file, and of all tensors: four pebibytes, and far from what a Python float rounds.
_MOST_BYTES = 2**52
_MOST_FILES = 10_000
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_REPLACED_HINT = (
    "The file was replaced or damaged after the bundle was packed, or manifest.json belongs to "
    "another bundle. Pack it again, or copy the whole bundle again."
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A small file (configuration, tokenizer): relative name, bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorsEntry:
    """A .tensors file."""

    size: int  # bytes of the file
    tensors: int
    data_bytes: int  # of all tensors
    index_sha256: str  # FileIndex.digest
    headers_sha256: str  # of all tensor headers, in file order


@dataclass(frozen=True, slots=True)
class Encryption:
    """How the .tensors files are sealed."""

    cipher: str
    chunk_bytes: int
    key: str  # "key" (32 bytes) or "passphrase"


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest, checked."""

    files: tuple[FileEntry, ...]
    tensors_files: Mapping[str, TensorsEntry]
    encryption: Encryption | None
    made_by: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    """For which engine the tensors are, in layout `vllm`; None in layout `hf`."""

    @property
    def layout(self) -> str:
        """One of LAYOUTS."""
        return VLLM if self.fingerprint else HF

    def to_json(self) -> bytes:
        """The manifest as it stands in the bundle."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "layout": self.layout,
            "files": [asdict(entry) for entry in self.files],
            "tensors_files": {name: asdict(entry) for name, entry in self.tensors_files.items()},
            "encryption": asdict(self.encryption) if self.encryption else None,
            "made_by": dict(self.made_by),
        }
        if self.fingerprint is not None:
            document["fingerprint"] = self.fingerprint.to_json()
        return (json.dumps(document, indent=2) + "\n").encode()


def read_manifest(bundle_uri: str, access: Access) -> Manifest | None:
    """The manifest of the bundle at `bundle_uri`, or None where it has none.

    Raises CorruptError if it is not one, ConfigurationError if it is of a version or layout that
    this release does not know, and the sources' errors.
    """
    try:
        source = sources.open_source(sources.join(bundle_uri, MANIFEST), access)
    except NotFoundError:
        return None
    try:
        if source.size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{source.name} is {source.size} bytes, too large for a manifest.")
        return parse_manifest(source.read(0, source.size), source.name)
    finally:
        source.close()


def parse_manifest(data: bytes, name: str) -> Manifest:
    """The manifest in `data`, which came from `name`. Raises as read_manifest does."""
    try:
        document = _Fields(read_json(data, strict=True), "the document")
        if document.text("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version, layout = document.natural("version"), document.text("layout")
        if version != VERSION or layout not in LAYOUTS:
            raise ConfigurationError(
                f"{name} is of version {version}, layout {layout!r}; this release knows version "
                f"{VERSION}, layouts {' and '.join(map(repr, LAYOUTS))}.",
                hint="Use a newer tensorserve, or pack the bundle again with this one.",
            )
        files = tuple(_file(_Fields(entry, "a file")) for entry in document.items("files"))
        tensors = {
            _relative(file_name): _tensors(_Fields(entry, f"tensors file {file_name!r}"))
            for file_name, entry in document.mapping("tensors_files").items()
        }
        names = [entry.name for entry in files] + list(tensors)
        if len(set(names)) != len(names):
            raise ValueError("it names a file twice")
        sealed = document.get("encryption")
        fingerprint = None
        if layout == VLLM:
            fingerprint = Fingerprint.from_json(document.get("fingerprint"))
            if set(model_files(fingerprint.ranks)) - set(tensors):
                raise ValueError(f"it lacks files of its {fingerprint.ranks} ranks")
        return Manifest(
            files=files,
            tensors_files=tensors,
            encryption=None if sealed is None else _encryption(_Fields(sealed, "encryption")),
            made_by={k: str(v) for k, v in document.mapping("made_by").items()},
            fingerprint=fingerprint,
        )
    except ValueError as error:
        raise CorruptError(
            f"{name} is not a manifest: {error}.", hint="Pack the bundle again."
        ) from error


def model_files(ranks: int) -> tuple[str, ...]:
    """What `pack` calls the model's .tensors files."""
    return (SINGLE,) if ranks == 1 else tuple(SHARDS % rank for rank in range(ranks))


def check_index(manifest: Manifest, name: str, index: FileIndex) -> None:
    """Raises CorruptError unless `index`, read from file `name` of the bundle, is what was packed.

    The index digest covers every tensor's name, dtype, shape, order and place.
    """
    entry = manifest.tensors_files.get(name)
    if entry is None:
        raise CorruptError(f"{name} is not in the bundle's {MANIFEST}.", hint=_REPLACED_HINT)
    if index.size != entry.size:
        raise CorruptError(
            f"{name} is {index.size} bytes, the bundle's {MANIFEST} says {entry.size}.",
            hint=_REPLACED_HINT,
        )
    if index.digest != entry.index_sha256:
        raise CorruptError(
            f"The index of {name} (names, dtypes, shapes, order) is not the one that the bundle's "
            f"{MANIFEST} describes.",
            hint=_REPLACED_HINT,
        )
    if index.encrypted != (manifest.encryption is not None):
        raise CorruptError(
            f"{name} is {'' if index.encrypted else 'not '}encrypted, the bundle's {MANIFEST} "
            "says otherwise.",
            hint=_REPLACED_HINT,
        )


class _Fields:
    """A JSON object whose members are taken with their types checked. Raises ValueError."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        self._value: dict[str, Any] = value
        self._where = where

    def get(self, name: str) -> object:
        if name not in self._value:
            raise ValueError(f"{self._where} has no {name!r}")
        return self._value[name]

    def _bad(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{name!r} of {self._where} is not {wanted}")

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self._bad(name, "a text")
        return value

    def digest(self, name: str) -> str:
        value = self.text(name)
        if not _HEX_DIGEST.fullmatch(value):
            raise self._bad(name, "a SHA-256 in hex")
        return value

    def natural(self, name: str, most: int = _MOST_BYTES) -> int:
        value = self.get(name)
        # bool is an int in Python, not in JSON.
        if type(value) is not int or not 0 <= value <= most:
            raise self._bad(name, f"a whole number from 0 to {most}")
        return value

    def items(self, name: str) -> list[object]:
        value = self.get(name)
        if not isinstance(value, list) or len(value) > _MOST_FILES:
            raise self._bad(name, f"a list of at most {_MOST_FILES}")
        return value

    def mapping(self, name: str) -> dict[str, object]:
        value = self.get(name)
        if not isinstance(value, dict) or len(value) > _MOST_FILES:
            raise self._bad(name, f"an object of at most {_MOST_FILES} members")
        return value


def _file(fields: _Fields) -> FileEntry:
    name = _relative(fields.text("name"))
    return FileEntry(name, fields.natural("size"), fields.digest("sha256"))


def _tensors(fields: _Fields) -> TensorsEntry:
    return TensorsEntry(
        size=fields.natural("size"),
        tensors=fields.natural("tensors"),
        data_bytes=fields.natural("data_bytes"),
        index_sha256=fields.digest("index_sha256"),
        headers_sha256=fields.digest("headers_sha256"),
    )


def _encryption(fields: _Fields) -> Encryption:
    return Encryption(fields.text("cipher"), fields.natural("chunk_bytes"), fields.text("key"))


def _relative(name: str) -> str:
    """`name`, if it stays below the bundle's directory."""
    if leaves_bundle(name) or name == MANIFEST:
        raise ValueError(f"it names a file outside of the bundle, or itself: {name!r}")
    return name
