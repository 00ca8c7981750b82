"""What does a bundle's manifest.json say, and does the bundle agree with it?

The format is described in docs/bundle-format.md. A manifest comes from the same untrusted place as
the bundle: its MAC is compared before anything of it is believed, where there is a key for it, and
every type and name in it is checked before use.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from tensorserve import sources
from tensorserve.authentication import ManifestKeys, Parameters, UnknownMacError
from tensorserve.bounded_json import read_json
from tensorserve.bundle_names import leaves_bundle
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.fingerprint import HF, LAYOUTS, VLLM, Fingerprint
from tensorserve.format import FileIndex, PasswordHash
from tensorserve.keys import ModelKey
from tensorserve.sources import Access, NotFoundError

MANIFEST = "manifest.json"
SINGLE, SHARDS = "model.tensors", "model-rank-%03d.tensors"
FORMAT = "tensorserve-bundle"
VERSION = 2
# Without authentication: read as long as there are such bundles.
OLD_VERSION = 1
CIPHER = "xsalsa20-poly1305"
# Some 100,000 tensors' digests. What JSON says in a byte takes up to 25 in memory.
MAX_MANIFEST_BYTES = 16 * 1024**2
# Of one file, and of all tensors: four pebibytes, and far from what a Python float rounds.
_MOST_BYTES = 2**52
_MOST_FILES = 10_000
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")
_PIN_HINT = (
    "`tensorserve verify` prints the SHA-256 of a bundle's manifest.json. If this bundle is meant, "
    "set TENSORSERVE_MANIFEST_SHA256 to its value; if not, somebody exchanged it."
)
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
    digests: tuple[bytes, ...] | None = field(default=None, repr=False)
    """SHA-256 of each tensor in file order (format.HashCheck); None where the headers have them,
    or nobody had the key."""


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
    version: int = VERSION
    sha256: str = ""
    """Of the file that it was read from, in hex; empty for one that is to be written."""
    vouched_by: str | None = None
    """KEY: its MAC fits; PIN: it is the one that the user named; None: anybody may have written it.
    """

    @property
    def layout(self) -> str:
        """One of LAYOUTS."""
        return VLLM if self.fingerprint else HF

    def to_json(self, key: ModelKey | None, derivation: PasswordHash | None = None) -> bytes:
        """The manifest as it stands in the bundle, authenticated with the `key` of a sealed one.

        `derivation` says how `key` comes from a passphrase: best as in the files, so that it is
        derived once. ValueError if there is a key for a plain bundle, or none for a sealed one.
        """
        if (key is None) != (self.encryption is None):
            raise ValueError("a sealed bundle's manifest needs the key, a plain one's has none")
        parameters = Parameters.fresh(derivation)
        keys = parameters.keys(key, MANIFEST) if key is not None else None
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "layout": self.layout,
            "files": [asdict(entry) for entry in self.files],
            "tensors_files": {
                name: _tensors_document(entry, keys) for name, entry in self.tensors_files.items()
            },
            "encryption": asdict(self.encryption) if self.encryption else None,
            "made_by": dict(self.made_by),
            "authentication": parameters.to_json() if keys is not None else None,
        }
        if self.fingerprint is not None:
            document["fingerprint"] = self.fingerprint.to_json()
        if keys is not None:
            document["authentication"]["mac"] = keys.mac(document)
        return (json.dumps(document, indent=2) + "\n").encode()


KEY, PIN = "key", "pin"


def read_manifest(
    bundle_uri: str, access: Access, key: ModelKey | None, *, pin: str | None = None
) -> Manifest | None:
    """The manifest of the bundle at `bundle_uri`, or None where it has none.

    With a `key`, a manifest of version 2 must carry a MAC of it, unless it says of a plain bundle:
    UnknownMacError. `pin` is the only SHA-256 (hex) that it may have; then there must be one. What
    else it says is believed only as far as `vouched_by` goes. Raises CorruptError if it is not
    one, ConfigurationError if it is of a version or layout that this release does not know, the
    key's errors and the sources'.
    """
    try:
        source = sources.open_source(sources.join(bundle_uri, MANIFEST), access)
    except NotFoundError as error:
        if pin is not None:
            raise CorruptError(
                f"{error.message} TENSORSERVE_MANIFEST_SHA256 asks for it.", hint=_PIN_HINT
            ) from error
        return None
    try:
        if source.size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{source.name} is {source.size} bytes, too large for a manifest.")
        return parse_manifest(source.read(0, source.size), source.name, key, pin=pin)
    finally:
        source.close()


def parse_manifest(
    data: bytes, name: str, key: ModelKey | None = None, *, pin: str | None = None
) -> Manifest:
    """The manifest in `data`, which came from `name`. Raises as read_manifest does."""
    sha256 = hashlib.sha256(data).hexdigest()
    if pin is not None and not hmac.compare_digest(pin, sha256):
        raise CorruptError(
            f"{name} has the SHA-256 {sha256}, TENSORSERVE_MANIFEST_SHA256 is {pin}: it is another "
            "bundle's, or an older or newer one of this bundle.",
            hint=_PIN_HINT,
        )
    try:
        document = _Fields(read_json(data, strict=True), "the document")
        if document.text("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = document.natural("version")
        if version not in {OLD_VERSION, VERSION}:
            _refuse_unknown(name, version, None)
        keys = _authenticated(document, name, key) if version == VERSION else None
        layout = document.text("layout")
        if layout not in LAYOUTS:
            _refuse_unknown(name, version, layout)
        files = tuple(_file(_Fields(entry, "a file")) for entry in document.items("files"))
        tensors = {
            _relative(file_name): _tensors(_Fields(entry, f"tensors file {file_name!r}"), keys)
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
            version=version,
            sha256=sha256,
            vouched_by=KEY if keys is not None else PIN if pin is not None else None,
        )
    except ValueError as error:
        raise CorruptError(
            f"{name} is not a manifest: {error}.", hint="Pack the bundle again."
        ) from error


def _authenticated(document: _Fields, name: str, key: ModelKey | None) -> ManifestKeys | None:
    """The manifest's keys, if there are any and its MAC is theirs.

    Raises UnknownMacError, ValueError for what is no authentication, and the key's errors.
    """
    stated = document.get("authentication")
    if (stated is None) != (document.get("encryption") is None):
        raise ValueError("a sealed bundle has a MAC, and no other")
    if stated is None or key is None:
        return None
    keys = Parameters.from_json(stated).keys(key, name)
    if not keys.fits(document.content):
        raise UnknownMacError(
            f"The MAC of {name} does not fit the key from {key.origin or 'the settings'}: it is "
            "another bundle's key, or somebody without the key changed the manifest.",
            hint="Compare the key with the one that packed the bundle. If it is that, copy the "
            "whole bundle again from where it was packed, and look who can write here.",
        )
    return keys


def _refuse_unknown(name: str, version: int, layout: str | None) -> NoReturn:
    said = f"version {version}" + ("" if layout is None else f", layout {layout!r}")
    raise ConfigurationError(
        f"{name} is of {said}; this release knows versions {OLD_VERSION} and {VERSION}, layouts "
        f"{' and '.join(map(repr, LAYOUTS))}.",
        hint="Use a newer tensorserve, or pack the bundle again with this one.",
    )


def manifest_line(sha256: str, vouched_by: str | None) -> str:
    """What the terminal is told of a manifest: who vouches for it, and what pins it."""
    words = {KEY: "authenticated by the key", PIN: "the one that is asked for"}
    return f"{words.get(vouched_by or '', 'not authenticated')}, SHA-256 {sha256}"


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

    @property
    def content(self) -> Mapping[str, Any]:
        """All of it."""
        return self._value

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


def _tensors(fields: _Fields, keys: ManifestKeys | None) -> TensorsEntry:
    tensors, digests = fields.natural("tensors"), None
    if keys is not None:
        digests = keys.open_digests(fields.text("digests"))
        if len(digests) != tensors:
            raise ValueError(f"it has {len(digests)} digests for {tensors} tensors")
    return TensorsEntry(
        size=fields.natural("size"),
        tensors=tensors,
        data_bytes=fields.natural("data_bytes"),
        index_sha256=fields.digest("index_sha256"),
        headers_sha256=fields.digest("headers_sha256"),
        digests=digests,
    )


def _tensors_document(entry: TensorsEntry, keys: ManifestKeys | None) -> dict[str, Any]:
    document = asdict(entry)
    del document["digests"]
    if keys is not None:
        if entry.digests is None:
            raise ValueError("a sealed file's tensors have no digests")
        document["digests"] = keys.seal_digests(entry.digests)
    return document


def _encryption(fields: _Fields) -> Encryption:
    return Encryption(fields.text("cipher"), fields.natural("chunk_bytes"), fields.text("key"))


def _relative(name: str) -> str:
    """`name`, if it stays below the bundle's directory."""
    if leaves_bundle(name) or name == MANIFEST:
        raise ValueError(f"it names a file outside of the bundle, or itself: {name!r}")
    return name
