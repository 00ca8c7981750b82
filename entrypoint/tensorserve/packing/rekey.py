"""How does `tensorserve rekey URI DEST` give a model a new key?

All tensors are read, authenticated, and sealed anew on their way to another place, a few at a time.
The old bundle stays as it is and serves on; the new one is there completely or not at all
(destination.py). The same place cannot be both: a bucket has no step that replaces several objects
at once.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tensorserve import sources
from tensorserve.bundle.compiled import fingerprint_in
from tensorserve.bundle.keys import GivenKey, ModelKey
from tensorserve.bundle.manifest import (
    KEY,
    MANIFEST,
    SHARDS,
    SIGNATURE,
    SINGLE,
    FileEntry,
    Manifest,
    TensorsEntry,
    check_index,
    manifest_line,
)
from tensorserve.bundle.manifest_mac import Parameters
from tensorserve.bundle.tensors_file import open_manifest, open_tensors
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.packing.bundle_files import (
    SPARE_BYTES,
    ByteCount,
    PlannedFile,
    Progress,
    encryption_of,
    write_small,
    write_tensors,
)
from tensorserve.packing.destination import Destination, open_destination, refuse_unwritable
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.packing.recipients import wrapped_for
from tensorserve.packing.sealed_tensors import from_sealed
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
from tensorserve.sources.local import local_path
from tensorserve.version import __version__
from tensorserve.wrapping.base import Provider, fingerprint_of

if TYPE_CHECKING:
    from tensorserve.bundle.wrapped_keys import WrappedKeys

_COPY_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Rekeyed:
    """The new bundle. ``str()`` gives the lines for the terminal."""

    source: str  # redacted, as the next
    destination: str
    tensors: int
    data_bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    unsigned: bool
    """The old bundle is signed, and the new one is not."""
    key_origin: str
    recipients: tuple[str, ...]
    fingerprint: str
    sha256: str  # of manifest.json
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.destination}: {self.tensors} tensors, {self.data_bytes / 1e6:.1f} MB, sealed "
            f"with the key from {self.key_origin}",
            f"  with {', '.join(self.files)}",
        ]
        if self.left_out:
            lines.append(
                f"  left out: {', '.join(self.left_out)}; compiled code is sealed with the old "
                "key: run `tensorserve precompile` for the new bundle"
            )
        if self.unsigned:
            lines.append(
                f"  not signed, unlike {self.source}: `tensorserve sign` the new bundle, or give "
                "--sign-key"
            )
        if self.recipients:
            lines.append(f"  key wrapped for {', '.join(self.recipients)}")
        lines.append(f"  key fingerprint: {self.fingerprint}")
        lines.append(f"  {MANIFEST}: {manifest_line(self.sha256, KEY)}")
        lines.append(
            f"  {self.source} is as it was: delete it when no server reads it; whoever has its key "
            "can read each copy of it"
        )
        lines.append(f"  in {self.seconds:.1f} s")
        return "\n".join(lines)


def rekey(
    uri: str,
    dest: str,
    access: Access,
    old: ModelKey | None,
    new: GivenKey,
    *,
    recipients: Sequence[Provider] = (),
    signer: BundleSigner | None = None,
    overwrite: bool = False,
    pin: str | None = None,
    progress: Progress | None = None,
) -> Rekeyed:
    """Writes the bundle at `uri`, which `old` opens, to `dest`, sealed with `new`.

    `new` is wrapped for each of `recipients`, which are asked before anything is written. Where
    there is a `signer`, it signs the new bundle. `dest` is
    a directory or a prefix of a bucket; `overwrite` allows it to hold another bundle, which is
    replaced. `pin` is TENSORSERVE_MANIFEST_SHA256. Memory: three times the largest tensor, and four
    parts of 16 MiB for a bucket.

    On any error, KeyboardInterrupt included, what was written is removed. Raises UsageError for a
    single file and for places that contain each other; ConfigurationError without the old key, for
    a new key that is the old one, and for a bundle whose manifest is not authenticated by a key;
    CorruptError for damage; and the sources', the recipients' and the destination's errors.
    """
    started = time.monotonic()
    _refuse_places(uri, dest)
    if old is None:
        raise ConfigurationError(
            "`rekey` needs the key that the bundle has now.",
            hint="Set TENSORSERVE_KEY_FILE, or TENSORSERVE_KEY_URI as one of its recipients.",
        )
    name = redact_uri(sources.join(uri, MANIFEST))
    manifest = _authenticated(uri, access, old, pin, name)
    assert manifest.parameters is not None
    if hmac.compare_digest(old.for_parameters(manifest.parameters.derivation, name), new.reveal()):
        raise ConfigurationError(
            f"The new key, from {new.origin}, is the key that the bundle has.",
            hint="Name a key file that does not exist: it is made. Or --wrap alone.",
        )
    parameters, wrapped = Parameters.fresh(None), None
    if recipients:
        secret = Secret(new.reveal(), new.origin)
        wrapped = wrapped_for(recipients, secret, parameters.salt)
    present = sources.list_names(uri, access) or {}
    needed = sum(entry.size for entry in manifest.files) + SPARE_BYTES
    needed += sum(entry.size for entry in manifest.tensors_files.values())
    signed: dict[str, str] | None = None if signer is None else {}
    with open_destination(dest, access, overwrite=overwrite, needed=needed) as destination:
        made, count = _write(
            uri, access, old, new, manifest, destination, parameters, wrapped, progress, signed
        )
        if signer is not None and signed is not None:
            signature = signer.sign_bundle(signed, manifest.files, made, dest)
            write_small(destination, SIGNATURE, signature)
        write_small(destination, MANIFEST, made)
    return Rekeyed(
        source=redact_uri(uri),
        destination=redact_uri(dest),
        tensors=sum(entry.tensors for entry in manifest.tensors_files.values()),
        data_bytes=count.whole,
        files=(*manifest.tensors_files, *(entry.name for entry in manifest.files)),
        unsigned=signer is None and SIGNATURE in present,
        left_out=tuple(sorted(found for found in present if fingerprint_in(found))),
        key_origin=new.origin,
        recipients=() if wrapped is None else tuple(map(str, wrapped.recipients)),
        fingerprint=fingerprint_of(new.reveal()),
        sha256=hashlib.sha256(made).hexdigest(),
        seconds=time.monotonic() - started,
    )


def _authenticated(uri: str, access: Access, old: ModelKey, pin: str | None, name: str) -> Manifest:
    manifest = open_manifest(uri, access, old, (SINGLE, SHARDS % 0), pin=pin)
    if manifest is None or manifest.authenticated_by != KEY:
        what = "there is none" if manifest is None else "it is not authenticated by a key"
        raise ConfigurationError(
            f"`rekey` takes what {name} authenticates, and {what}.",
            hint="Of an encrypted bundle: `tensorserve sign URI` first, with its key. A plain one "
            "has no key: pack the model with --encrypt.",
        )
    return manifest


def _write(
    uri: str,
    access: Access,
    old: ModelKey,
    new: GivenKey,
    manifest: Manifest,
    destination: Destination,
    parameters: Parameters,
    wrapped: WrappedKeys | None,
    progress: Progress | None,
    signed: dict[str, str] | None,
) -> tuple[bytes, ByteCount]:
    """Writes all files but the manifest, whose content it gives.

    The SHA-256 of .tensors files are put into `signed`.
    """
    count = ByteCount(sum(e.data_bytes for e in manifest.tensors_files.values()), progress)
    tensors: dict[str, TensorsEntry] = {}
    for name, entry in manifest.tensors_files.items():
        with ExitStack() as stack:
            opened = open_tensors(sources.join(uri, name), access, old)
            stack.callback(opened.source.close)
            check_index(manifest, name, opened.index)
            assert entry.digests is not None  # of a manifest that a key authenticates
            file = PlannedFile(name, from_sealed(opened, entry.digests), True, None)
            tensors[name] = write_tensors(destination, file, new, count, None, signed)
    for small in manifest.files:
        _copy(uri, access, small, destination)
    made = Manifest(
        files=manifest.files,
        tensors_files=tensors,
        encryption=encryption_of(new),
        made_by={"tensorserve": __version__},
        fingerprint=manifest.fingerprint,
        parameters=parameters,
        wrapped_keys=wrapped,
    ).to_json(new)
    return made, count


def _copy(uri: str, access: Access, entry: FileEntry, destination: Destination) -> None:
    source = sources.open_source(sources.join(uri, entry.name), access)
    digest = hashlib.sha256()
    try:
        if source.size == entry.size:
            with destination.create(entry.name, entry.size) as out:
                for offset in range(0, entry.size, _COPY_BYTES):
                    data = source.read(offset, min(_COPY_BYTES, entry.size - offset))
                    digest.update(data)
                    out.write(data)
        if source.size != entry.size or digest.hexdigest() != entry.sha256:
            raise CorruptError(
                f"{source.name} is not the file that {MANIFEST} describes.",
                hint="Copy the whole bundle again, and check who can write to this storage.",
            )
    finally:
        source.close()


def _refuse_places(uri: str, dest: str) -> None:
    if uri.endswith(".tensors"):
        raise UsageError(
            "`rekey` is for a whole bundle, not a single file.",
            hint="Give the URI of the bundle's directory.",
        )
    refuse_unwritable(dest)
    old, new = _place(uri), _place(dest)
    if old[0] == new[0] and (old[1].is_relative_to(new[1]) or new[1].is_relative_to(old[1])):
        raise UsageError(
            f"DEST {redact_uri(dest)} and the bundle {redact_uri(uri)} are one place, or one "
            "contains the other.",
            hint="Give another name: the old bundle serves on until you delete it.",
        )


def _place(uri: str) -> tuple[str, PurePosixPath]:
    """(scheme and bucket, path), to compare places with."""
    if "://" not in uri or uri.startswith("file://"):
        return "", PurePosixPath(local_path(uri).resolve())
    scheme, _, rest = uri.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}", PurePosixPath("/") / path.strip("/")
