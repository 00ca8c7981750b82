"""How does a bundle that is there already get an authenticated manifest? `tensorserve sign URI`.

All of it is read and checked first, and what was read is what the manifest says. It is written
last, in one step: until then the bundle is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorserve import __version__
from tensorserve.artifacts import artifact_names
from tensorserve.destinations import refuse_unwritable, replace_file
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.fingerprint import Fingerprint
from tensorserve.format import TensorHeader
from tensorserve.keys import ModelKey
from tensorserve.manifest import (
    CIPHER,
    KEY,
    MANIFEST,
    Encryption,
    FileEntry,
    Manifest,
    TensorsEntry,
    manifest_line,
    parse_manifest,
)
from tensorserve.secret import redact_uri
from tensorserve.sources import Access
from tensorserve.verification import AUTO, MANIFEST_ONLY
from tensorserve.verifying import FileResult, Progress, Verified, describe_file, verify


@dataclass(frozen=True)
class Signed:
    """What was signed. ``str()`` of it is fit for the terminal."""

    bundle: str  # redacted
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    sha256: str  # of manifest.json
    sealed: bool

    def __str__(self) -> str:
        lines = [f"{self.bundle}: signed {', '.join(self.files)}"]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        lines.append(f"  {MANIFEST}: {manifest_line(self.sha256, KEY if self.sealed else None)}")
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
) -> Signed:
    """Verifies the bundle at `uri` (a directory or s3://bucket/prefix) and writes its manifest.

    The files are those of the manifest that is there, else all that a start would take. Arguments
    and errors are those of `verify`, which is asked first; ConfigurationError for a place that
    cannot be written and for a bundle whose manifest is missing and cannot be made again.
    """
    if uri.endswith(".tensors"):
        raise UsageError("A bundle is signed whole.", hint="Give its directory.")
    refuse_unwritable(uri)
    if wish == MANIFEST_ONLY:
        wish = AUTO  # what it asks for is made here
    verified = verify(uri, access, key, on_line, progress, wish=wish, pin=pin)
    weights = [r for r in verified.results if isinstance(r.entry, TensorsEntry)]
    small = _small_files(uri, access, verified)
    manifest = Manifest(
        files=small,
        tensors_files={r.name: r.entry for r in weights if isinstance(r.entry, TensorsEntry)},
        encryption=_encryption(weights),
        made_by={"tensorserve": __version__},
        fingerprint=_fingerprint(verified.manifest, weights),
    )
    header = _sealed(weights)
    data = manifest.to_json(key, header.key_derivation if header else None)
    # What we could not read again must not be written.
    sha256 = parse_manifest(data, MANIFEST, key).sha256
    replace_file(uri, MANIFEST, data, access)
    names = (*manifest.tensors_files, *(entry.name for entry in small))
    return Signed(
        bundle=redact_uri(uri),
        files=names,
        left_out=tuple(r.name for r in verified.results if r.name not in {*names, MANIFEST}),
        sha256=sha256,
        sealed=key is not None,
    )


def _small_files(uri: str, access: Access, verified: Verified) -> tuple[FileEntry, ...]:
    if verified.manifest is not None:
        return verified.manifest.files
    # Code as well: it runs only where the user trusts it, and then it has to be vouched for.
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
            "The bundle holds vLLM's own parameters, and its manifest.json, which says of which "
            "engine, is missing.",
            hint="Copy that manifest back, or pack the model again.",
        )
    return fingerprint
