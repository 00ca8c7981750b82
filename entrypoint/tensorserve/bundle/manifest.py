"""What does a bundle's manifest.json say, and does a .tensors file match it?

The format is described in docs/bundle-format.md. A manifest is as untrusted as the storage that it
comes from: with a key, its MAC is compared before its content is used, and every type and name in
it is checked before use.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from tensorserve import sources
from tensorserve.bounded_json import read_json
from tensorserve.bundle import adapter_identity
from tensorserve.bundle.adapter_identity import AdapterIdentity
from tensorserve.bundle.engine_fingerprint import HF, LAYOUTS, VLLM, Fingerprint
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.json_fields import JsonFields
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest_mac import (
    ManifestKeys,
    Parameters,
    UnknownMacError,
    mac_input,
)
from tensorserve.bundle.not_a_bundle import refuse_web_page
from tensorserve.bundle.wrapped_keys import MEMBER, WrappedKeys
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, PasswordHash
from tensorserve.sources import Access, ForbiddenError, NotFoundError

MANIFEST = "manifest.json"
# Its name by default in OpenSSF's model signing (bundle/model_signature.py).
SIGNATURE = "model.sig"
SINGLE, SHARDS = "model.tensors", "model-rank-%03d.tensors"
FORMAT = "tensorserve-bundle"
VERSION = 2
# Version 1 has no authentication. It is read as long as such bundles exist.
OLD_VERSION = 1
CIPHER = "xsalsa20-poly1305"
# Enough for the digests of some 100,000 tensors. Parsed JSON takes up to 25 bytes of memory for a
# byte of text.
MAX_MANIFEST_BYTES = 16 * 1024**2
_PIN_HINT = (
    "`tensorserve verify` prints the SHA-256 of a bundle's manifest.json. If this is the right "
    "bundle, set TENSORSERVE_MANIFEST_SHA256 to that value; if not, the bundle was replaced."
)
_REPLACED_HINT = (
    "The file was replaced or damaged after the bundle was packed, or manifest.json belongs to "
    "another bundle. Pack it again, or copy the whole bundle again."
)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A small file (configuration, tokenizer): relative name, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorsEntry:
    """A .tensors file."""

    size: int  # of the file, in bytes
    tensors: int  # number of tensors
    data_bytes: int  # of all tensors together
    index_sha256: str  # FileIndex.digest
    headers_sha256: str  # of all tensor headers, in file order
    digests: tuple[bytes, ...] | None = field(default=None, repr=False)
    """SHA-256 of each tensor in file order, 32 bytes each (format.HashCheck). None if the file is
    plain (its tensor headers have the digests) or the manifest was read without the key."""


@dataclass(frozen=True, slots=True)
class Encryption:
    """How the .tensors files are encrypted."""

    cipher: str
    chunk_bytes: int
    key: str  # "key" (32 bytes) or "passphrase"


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest; every type and name in it is valid."""

    files: tuple[FileEntry, ...]
    tensors_files: Mapping[str, TensorsEntry]
    encryption: Encryption | None
    made_by: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None
    """The engine that the tensors fit, in layout `vllm`; None in layout `hf`."""
    version: int = VERSION
    sha256: str = ""
    """Of the file that the manifest was read from, in hex; empty for a manifest to write."""
    authenticated_by: str | None = None
    """KEY: its MAC is valid. PIN: its SHA-256 is TENSORSERVE_MANIFEST_SHA256. None: it is not
    authenticated."""
    content_sha256: str = ""
    """Of what it says but for `wrapped_keys` and the MAC, in hex: rewrapping keeps it."""
    parameters: Parameters | None = None
    """How its keys are derived; None for a plain bundle and in version 1."""
    wrapped_keys: WrappedKeys | None = None
    """The model's key for those who have another one; None if nobody has."""
    adapter: AdapterIdentity | None = None
    """Which adapter this bundle holds instead of a model; None: it holds a model."""

    @property
    def layout(self) -> str:
        """One of LAYOUTS."""
        return VLLM if self.fingerprint else HF

    def to_json(self, key: ModelKey | None, derivation: PasswordHash | None = None) -> bytes:
        """The content of manifest.json. An encrypted bundle's is authenticated with `key`.

        `derivation` has the parameters that derive `key` from a passphrase. With those of the
        .tensors files, a start derives the key once. Where `parameters` is set, it is used instead:
        wrapped keys are bound to its salt. Raises ValueError for a key with a plain bundle, for an
        encrypted bundle without a key or without its tensors' digests, and for wrapped keys without
        `parameters`.
        """
        if (key is None) != (self.encryption is None):
            raise ValueError(
                "the manifest of an encrypted bundle needs a key, that of a plain bundle has none"
            )
        if self.wrapped_keys is not None and (key is None or self.parameters is None):
            raise ValueError("wrapped keys are bound to the salt of an encrypted bundle's manifest")
        parameters = self.parameters or Parameters.fresh(derivation)
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
        if self.adapter is not None:
            document[adapter_identity.MEMBER] = self.adapter.to_json()
        if self.wrapped_keys is not None:
            document[MEMBER] = self.wrapped_keys.to_json()
        if keys is not None:
            document["authentication"]["mac"] = keys.mac(document)
        return _text(document)


KEY, PIN = "key", "pin"


def read_manifest(
    bundle_uri: str,
    access: Access,
    key: ModelKey | None,
    *,
    pin: str | None = None,
    may_be_hidden: bool = False,
) -> Manifest | None:
    """The manifest of the bundle at `bundle_uri`, or None if it has none.

    With a `key`, the MAC of an encrypted bundle's manifest (version 2) must be that key's. With a
    `pin`, there must be a manifest and its SHA-256 (hex) must equal `pin`. `authenticated_by` says
    which of the two holds. `may_be_hidden`: without a pin, an answer of 403 counts as no manifest,
    since some servers answer 403 for missing files.

    Raises UnknownMacError for another MAC, CorruptError for an invalid or missing manifest or
    another SHA-256, ConfigurationError for an unknown version or layout, the key's errors and the
    sources' errors.
    """
    try:
        source = sources.open_source(sources.join(bundle_uri, MANIFEST), access)
    except NotFoundError as error:
        if pin is not None:
            raise CorruptError(
                f"{error.message} TENSORSERVE_MANIFEST_SHA256 requires it.", hint=_PIN_HINT
            ) from error
        return None
    except ForbiddenError as error:
        if may_be_hidden and pin is None:
            return None
        if key is None and pin is None:
            raise
        hint = f"Allow {MANIFEST} to be read, or have the server answer 404 for missing files."
        if pin is None:
            hint += (
                " If the bundle never had one, TENSORSERVE_VERIFY=hashes compares each tensor's "
                "own digest instead."
            )
        raise ForbiddenError(
            f"{error.message} With a {'key' if pin is None else 'pin'}, this answer does not count "
            f"as a missing {MANIFEST}.",
            hint=hint,
        ) from error
    try:
        if source.size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{source.name} is {source.size} bytes, too large for a manifest.")
        data = source.read(0, source.size)
        refuse_web_page(source.name, data)
        return parse_manifest(data, source.name, key, pin=pin)
    finally:
        source.close()


def parse_manifest(
    data: bytes, name: str, key: ModelKey | None = None, *, pin: str | None = None
) -> Manifest:
    """The manifest in `data`, the content of `name`. Raises as read_manifest, except for sources'
    errors."""
    sha256 = hashlib.sha256(data).hexdigest()
    if pin is not None and not hmac.compare_digest(pin, sha256):
        raise CorruptError(
            f"{name} has the SHA-256 {sha256}, TENSORSERVE_MANIFEST_SHA256 is {pin}: it is another "
            "bundle's manifest, or an older or newer one of this bundle.",
            hint=_PIN_HINT,
        )
    try:
        document = JsonFields(read_json(data, strict=True), "the document")
        if document.text("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = document.natural("version")
        if version not in {OLD_VERSION, VERSION}:
            _refuse_unknown(name, version, None)
        keys = _authenticated(document, name, key) if version == VERSION else None
        parameters, wrapped = _key_wrapping(document) if version == VERSION else (None, None)
        layout = document.text("layout")
        if layout not in LAYOUTS:
            _refuse_unknown(name, version, layout)
        files = tuple(_file(JsonFields(entry, "a file")) for entry in document.items("files"))
        tensors = {
            _relative(file_name): _tensors(JsonFields(entry, f"tensors file {file_name!r}"), keys)
            for file_name, entry in document.mapping("tensors_files").items()
        }
        names = [entry.name for entry in files] + list(tensors)
        if len(set(names)) != len(names):
            raise ValueError("it names a file twice")
        sealed = document.get("encryption")
        adapter = document.content.get(adapter_identity.MEMBER) if version == VERSION else None
        fingerprint = None
        if layout == VLLM:
            fingerprint = Fingerprint.from_json(document.get("fingerprint"))
            if set(model_files(fingerprint.ranks)) - set(tensors):
                raise ValueError(f"it lacks files of its {fingerprint.ranks} ranks")
        return Manifest(
            files=files,
            tensors_files=tensors,
            encryption=None if sealed is None else _encryption(JsonFields(sealed, "encryption")),
            made_by={k: str(v) for k, v in document.mapping("made_by").items()},
            fingerprint=fingerprint,
            version=version,
            sha256=sha256,
            authenticated_by=KEY if keys is not None else PIN if pin is not None else None,
            content_sha256=content_sha256(document.content),
            parameters=parameters,
            wrapped_keys=wrapped,
            adapter=None if adapter is None else AdapterIdentity.from_json(adapter),
        )
    except ValueError as error:
        raise CorruptError(
            f"{name} is not a manifest: {error}.", hint="Pack the bundle again."
        ) from error


def rewrapped(data: bytes, name: str, key: ModelKey, wrapped: WrappedKeys) -> bytes:
    """The manifest in `data` with other wrapped keys. All else in it is kept, but for the MAC.

    Raises as parse_manifest, and ConfigurationError for a manifest that is not of version 2 or has
    no MAC.
    """
    parameters = wrapping_parameters(parse_manifest(data, name, key), name)
    document: dict[str, Any] = read_json(data, strict=True)
    document[MEMBER] = wrapped.to_json()
    document["authentication"]["mac"] = parameters.keys(key, name).mac(document)
    made = _text(document)
    # Read again before it is written: what cannot be read must not replace what can.
    parse_manifest(made, name, key)
    return made


def wrapping_parameters(manifest: Manifest, name: str) -> Parameters:
    """How the keys of a manifest are derived that can hold wrapped keys.

    Raises ConfigurationError for one that is not of version 2 or has no MAC.
    """
    if manifest.authenticated_by != KEY or manifest.parameters is None:
        raise ConfigurationError(
            f"{name} is not authenticated by a key: there is no key to wrap.",
            hint="Add an authenticated manifest: `tensorserve sign URI`, with the key.",
        )
    return manifest.parameters


def content_sha256(document: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical form without `wrapped_keys` and the MAC: the same bundle has
    the same one, whoever its recipients are."""
    bare = {name: value for name, value in document.items() if name != MEMBER}
    if not isinstance(bare.get("authentication"), Mapping):  # a plain bundle's, and version 1
        bare["authentication"] = {}
    return hashlib.sha256(mac_input(bare)).hexdigest()


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _key_wrapping(document: JsonFields) -> tuple[Parameters | None, WrappedKeys | None]:
    """How the manifest's keys are derived, and the wrapped keys. Neither is authenticated here."""
    stated, wrapped = document.get("authentication"), document.content.get(MEMBER)
    if stated is None:
        if wrapped is not None:
            raise ValueError(f"a plain bundle has no {MEMBER}")
        return None, None
    parameters = Parameters.from_json(stated)
    if wrapped is None:
        return parameters, None
    if parameters.derivation is not None:
        raise ValueError(f"a bundle with a passphrase has no {MEMBER}")
    return parameters, WrappedKeys.from_json(wrapped)


def _authenticated(document: JsonFields, name: str, key: ModelKey | None) -> ManifestKeys | None:
    """The manifest's keys if its MAC is valid; None for a plain bundle or without a `key`.

    Raises UnknownMacError for another MAC, ValueError for an invalid authentication, and the key's
    errors.
    """
    stated = document.get("authentication")
    if (stated is None) != (document.get("encryption") is None):
        raise ValueError("an encrypted bundle has a MAC, a plain one has none")
    if stated is None or key is None:
        return None
    keys = Parameters.from_json(stated).keys(key, name)
    if not keys.fits(document.content):
        raise UnknownMacError(
            f"The MAC of {name} does not fit the key from {key.origin or 'the settings'}: it is "
            "another bundle's key, or somebody without the key changed the manifest.",
            hint="Compare the key with the one that packed the bundle. If they are equal, copy the "
            "whole bundle again from where it was packed, and check who can write to this storage.",
        )
    return keys


def _refuse_unknown(name: str, version: int, layout: str | None) -> NoReturn:
    said = f"version {version}" + ("" if layout is None else f", layout {layout!r}")
    raise ConfigurationError(
        f"{name} is of {said}; this release knows versions {OLD_VERSION} and {VERSION}, layouts "
        f"{' and '.join(map(repr, LAYOUTS))}.",
        hint="Use a newer tensorserve, or pack the bundle again with this one.",
    )


def manifest_line(sha256: str, authenticated_by: str | None) -> str:
    """A manifest for the terminal: what authenticates it, and its SHA-256, the value of a pin."""
    words = {KEY: "authenticated by the key", PIN: "the pinned one"}
    return f"{words.get(authenticated_by or '', 'not authenticated')}, SHA-256 {sha256}"


def model_files(ranks: int) -> tuple[str, ...]:
    """The names that `pack` gives the model's .tensors files."""
    return (SINGLE,) if ranks == 1 else tuple(SHARDS % rank for rank in range(ranks))


def check_index(manifest: Manifest, name: str, index: FileIndex) -> None:
    """Raises CorruptError unless `index`, read from file `name`, matches the file's entry.

    The index digest covers every tensor's name, dtype, shape, order and offset.
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
            f"{name} is {'' if index.encrypted else 'not '}encrypted, but the bundle's {MANIFEST} "
            "says that it is"
            f"{' not' if index.encrypted else ''}.",
            hint=_REPLACED_HINT,
        )


def _file(fields: JsonFields) -> FileEntry:
    name = _relative(fields.text("name"))
    return FileEntry(name, fields.natural("size"), fields.digest("sha256"))


def _tensors(fields: JsonFields, keys: ManifestKeys | None) -> TensorsEntry:
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
            raise ValueError("the tensors of an encrypted file have no digests")
        document["digests"] = keys.seal_digests(entry.digests)
    return document


def _encryption(fields: JsonFields) -> Encryption:
    return Encryption(fields.text("cipher"), fields.natural("chunk_bytes"), fields.text("key"))


def _relative(name: str) -> str:
    """`name`. Raises ValueError if it leaves the bundle's directory or is the manifest's own."""
    if leaves_bundle(name) or name == MANIFEST:
        raise ValueError(f"it names a file outside the bundle, or itself: {name!r}")
    return name
