"""How does `tensorserve sign URI` add an authenticated manifest to an existing bundle?

The whole bundle is read and checked first, and the manifest describes the bytes that were read. It
is written last, in one step; until then the bundle is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tensorserve.bundle.download import artifact_names
from tensorserve.bundle.engine_fingerprint import Fingerprint
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import (
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
from tensorserve.bundle.trust import AUTO, MANIFEST_ONLY
from tensorserve.bundle.verify import FileResult, Verified, describe_file, verify
from tensorserve.bundle.verify_tensors import Progress
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.format import TensorHeader
from tensorserve.packing.destination import refuse_unwritable, replace_file
from tensorserve.secret import redact_uri
from tensorserve.sources import Access
from tensorserve.version import __version__


@dataclass(frozen=True)
class Signed:
    """What was signed. ``str()`` gives the lines for the terminal."""

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

    The small files are those of the existing manifest, or else all files that a start would copy.
    Arguments and errors are those of `verify`. Also raises UsageError for the URI of a single file,
    and ConfigurationError if `uri` cannot be written, or if the manifest of a bundle of layout
    `vllm` is missing, whose engine fingerprint cannot be restored.
    """
    if uri.endswith(".tensors"):
        raise UsageError(
            "`sign` signs a whole bundle, not a single file.",
            hint="Give the URI of the bundle's directory.",
        )
    refuse_unwritable(uri)
    if wish == MANIFEST_ONLY:
        wish = AUTO  # the manifest that it requires is written here
    verified = verify(uri, access, key, on_line, progress, wish=wish, pin=pin)
    weights = [r for r in verified.results if isinstance(r.entry, TensorsEntry)]
    small = _small_files(uri, access, verified)
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
    names = (*manifest.tensors_files, *(entry.name for entry in small))
    return Signed(
        bundle=redact_uri(uri),
        files=names,
        left_out=tuple(r.name for r in verified.results if r.name not in {*names, MANIFEST}),
        sha256=sha256,
        sealed=key is not None,
    )


def _wrapped(manifest: Manifest | None) -> dict[str, Any]:
    """The wrapped keys of the manifest that is replaced, and the salt that they are bound to."""
    if manifest is None or manifest.wrapped_keys is None or manifest.authenticated_by != KEY:
        return {}
    return {"parameters": manifest.parameters, "wrapped_keys": manifest.wrapped_keys}


def _small_files(uri: str, access: Access, verified: Verified) -> tuple[FileEntry, ...]:
    if verified.manifest is not None:
        return verified.manifest.files
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
