"""How does `tensorserve sign URI` add an authenticated manifest, and a signature, to a bundle?

The whole bundle is read and checked first; manifest and signature describe the bytes that were
read. Each is written in one step at the end; until then the bundle is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tensorserve import sources
from tensorserve.bundle.download import artifact_names
from tensorserve.bundle.engine_fingerprint import Fingerprint
from tensorserve.bundle.file_digest import sha256_of
from tensorserve.bundle.file_result import FileResult
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import (
    CIPHER,
    KEY,
    MANIFEST,
    SIGNATURE,
    VERSION,
    Encryption,
    FileEntry,
    Manifest,
    TensorsEntry,
    manifest_line,
    parse_manifest,
)
from tensorserve.bundle.model_signature import is_ignored
from tensorserve.bundle.trust import AUTO, MANIFEST_ONLY
from tensorserve.bundle.verify import Verified, describe_file, verify
from tensorserve.bundle.verify_tensors import Progress
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.format import TensorHeader
from tensorserve.packing.destination import refuse_unwritable, replace_file
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError
from tensorserve.version import __version__


@dataclass(frozen=True)
class Signed:
    """What was signed. ``str()`` gives the lines for the terminal.

    `files` are those that manifest.json names. The signature covers all files but those that
    signatures leave out (model_signature.IGNORED).
    """

    bundle: str  # redacted
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    sha256: str  # of manifest.json
    sealed: bool
    signed_by: str | None = None
    also: tuple[str, ...] = ()
    """Files that the signature covers and manifest.json does not."""

    def __str__(self) -> str:
        lines = [f"{self.bundle}: signed {', '.join(self.files)}"]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        lines.append(f"  {MANIFEST}: {manifest_line(self.sha256, KEY if self.sealed else None)}")
        if self.signed_by is not None:
            lines.append(f"  {SIGNATURE}: signed by {self.signed_by}")
            if self.also:
                lines.append(f"  with files that {MANIFEST} leaves out: {', '.join(self.also)}")
        return "\n".join(lines)


def sign(
    uri: str,
    access: Access,
    key: ModelKey | None,
    on_line: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    *,
    wish: str,
    pin: str | None = None,
    signer: BundleSigner | None = None,
) -> Signed:
    """Verifies the bundle at `uri` (a directory or s3://bucket/prefix) and writes its manifest.

    The small files are those of the existing manifest, or else all files that a start would copy.
    With a `signer`, a manifest that needs nothing is kept, and all files of the bundle are signed,
    for which they are read once more.

    Arguments and errors are those of `verify`. Also raises UsageError for the URI of a single file,
    and ConfigurationError if `uri` cannot be written, if it has a signature, which would not fit
    any more, and no `signer` is given, or if the manifest of a bundle of layout `vllm` is missing,
    whose engine fingerprint cannot be restored.
    """
    if uri.endswith(".tensors"):
        raise UsageError(
            "`sign` signs a whole bundle, not a single file.",
            hint="Give the URI of the bundle's directory.",
        )
    refuse_unwritable(uri)
    if signer is None:
        refuse_signed(uri, access, "`sign`")
    if wish == MANIFEST_ONLY:
        wish = AUTO  # the manifest that it requires is written here
    versions = _versions(uri, access) if signer is not None else {}
    verified = verify(uri, access, key, on_line, progress, wish=wish, pin=pin)
    weights = [r for r in verified.results if isinstance(r.entry, TensorsEntry)]
    small = _small_files(uri, access, verified)
    kept = verified.manifest
    if signer is not None and kept is not None and _needs_nothing(kept, sealed=key is not None):
        manifest, sha256 = kept, kept.sha256
    else:
        manifest, sha256 = _write_manifest(uri, access, key, verified, weights, small)
    names = (*manifest.tensors_files, *(entry.name for entry in small))
    signed: dict[str, str] = {}
    if signer is not None:
        signed = _hash_all(uri, access, manifest, sha256, versions, progress)
        replace_file(uri, SIGNATURE, signer.sign(signed, uri), access)
    return Signed(
        bundle=redact_uri(uri),
        files=names,
        left_out=tuple(
            r.name for r in verified.results if r.name not in {*names, *signed, MANIFEST, SIGNATURE}
        ),
        sha256=sha256,
        sealed=key is not None,
        signed_by=None if signer is None else str(signer.by),
        also=tuple(sorted(set(signed) - {*names, MANIFEST})),
    )


def refuse_signed(uri: str, access: Access, command: str) -> None:
    """Raises ConfigurationError if the bundle at `uri` is signed: `command` has no key to sign it
    again, and its signature is of the manifest as it is."""
    try:
        sources.open_source(sources.join(uri, SIGNATURE), access).close()
    except (NotFoundError, ForbiddenError):  # some stores answer 403 for what is not there
        return
    raise ConfigurationError(
        f"{redact_uri(uri)} is signed ({SIGNATURE}), and {command} would write a {MANIFEST} that "
        "the signature does not fit.",
        hint=f"Add --sign-key, to sign it again. Or delete {SIGNATURE}: where a signature is asked "
        "for, the bundle is refused then.",
    )


def _needs_nothing(manifest: Manifest, *, sealed: bool) -> bool:
    """Whether `manifest` is as one that would be written now."""
    authentic = manifest.authenticated_by == KEY or not sealed
    named = {entry.name for entry in manifest.files}
    return manifest.version == VERSION and authentic and SIGNATURE not in named


def _versions(uri: str, access: Access) -> dict[str, str | None]:
    """The version of each .tensors file, before it is verified."""
    found: dict[str, str | None] = {}
    for name in sources.list_names(uri, access) or ():
        if name.endswith(".tensors"):
            source = sources.open_source(sources.join(uri, name), access)
            found[name] = source.version
            source.close()
    return found


def _hash_all(
    uri: str,
    access: Access,
    manifest: Manifest,
    manifest_sha256: str,
    versions: dict[str, str | None],
    progress: Progress | None,
) -> dict[str, str]:
    """SHA-256 of all files to be signed; those that were verified are still what was verified."""
    known = {entry.name: entry.sha256 for entry in manifest.files} | {MANIFEST: manifest_sha256}
    found: dict[str, str] = {}
    for name in sorted(sources.list_names(uri, access) or ()):
        if is_ignored(name):
            continue
        place = sources.join(uri, name)
        found[name] = sha256_of(place, access, version=versions.get(name), progress=progress)
        if known.get(name, found[name]) != found[name]:
            raise CorruptError(
                f"{redact_uri(place)} was replaced while the bundle was signed.",
                hint="Try again when no other process writes to the bundle.",
            )
    missing = {*known, *manifest.tensors_files} - set(found)
    if missing:
        raise CorruptError(
            f"{redact_uri(uri)}: {min(missing)} vanished while the bundle was signed.",
            hint="Try again when no other process writes to the bundle.",
        )
    return found


def _write_manifest(
    uri: str,
    access: Access,
    key: ModelKey | None,
    verified: Verified,
    weights: list[FileResult],
    small: tuple[FileEntry, ...],
) -> tuple[Manifest, str]:
    """The new manifest, and the SHA-256 of its file."""
    manifest = Manifest(
        files=small,
        tensors_files={r.name: r.entry for r in weights if isinstance(r.entry, TensorsEntry)},
        encryption=_encryption(weights),
        made_by={"tensorserve": __version__},
        fingerprint=_fingerprint(verified.manifest, weights),
        adapter=verified.manifest.adapter if verified.manifest else None,
        **_wrapped(verified.manifest),
    )
    header = _sealed(weights)
    data = manifest.to_json(key, header.key_derivation if header else None)
    # Parsed again before it is written: a manifest that cannot be read must not replace another.
    sha256 = parse_manifest(data, MANIFEST, key).sha256
    replace_file(uri, MANIFEST, data, access)
    return manifest, sha256


def _wrapped(manifest: Manifest | None) -> dict[str, Any]:
    """The wrapped keys of the manifest that is replaced, and the salt that they are bound to."""
    if manifest is None or manifest.wrapped_keys is None or manifest.authenticated_by != KEY:
        return {}
    return {"parameters": manifest.parameters, "wrapped_keys": manifest.wrapped_keys}


def _small_files(uri: str, access: Access, verified: Verified) -> tuple[FileEntry, ...]:
    if verified.manifest is not None:
        return tuple(entry for entry in verified.manifest.files if entry.name != SIGNATURE)
    # Python files as well: with --trust-remote-code they must be in an authenticated manifest.
    names = artifact_names(uri, access, None, remote_code=True)
    return tuple(describe_file(uri, name, access) for name in names)


def _encryption(weights: list[FileResult]) -> Encryption | None:
    header = _sealed(weights)
    if header is None:
        return None
    assert header.chunks is not None
    made_of = "key" if header.key_derivation is None else "passphrase"
    return Encryption(CIPHER, header.chunks.chunk_size, made_of)


def _sealed(weights: list[FileResult]) -> TensorHeader | None:
    return next((result.sealed for result in weights if result.sealed is not None), None)


def _fingerprint(manifest: Manifest | None, weights: list[FileResult]) -> Fingerprint | None:
    fingerprint = manifest.fingerprint if manifest else None
    if fingerprint is None and any(result.for_rank for result in weights):
        raise ConfigurationError(
            "The bundle holds vLLM's own parameters, and its manifest.json is missing, which has "
            "the engine's fingerprint.",
            hint="Restore that manifest, or pack the model again.",
        )
    return fingerprint
