"""Is a bundle the one that was signed, as far as it can be told without its key?

manifest.json and the small files are compared byte for byte. Of the weights, which are read once
and only with the key, the size is compared here; the signed manifest binds their bytes while they
are loaded (bundle/manifest.py).
"""

from __future__ import annotations

import hashlib
import hmac
from concurrent.futures import ThreadPoolExecutor

from tensorserve import sources
from tensorserve.bundle.download import MAX_TOTAL_BYTES
from tensorserve.bundle.file_digest import digest_of
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from tensorserve.bundle.model_signature import HINT, ModelSignature
from tensorserve.errors import SignatureError
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, NotFoundError

_THREADS = 8
# Changed files that a message names.
_MAX_NAMED = 5


class ManifestChangedError(SignatureError):
    """manifest.json is not the one that was signed."""


def check_manifest(
    signature: ModelSignature, bundle_uri: str, access: Access, key: ModelKey | None = None
) -> Manifest:
    """manifest.json, which has to be the signed one, byte for byte.

    It counts as pinned. Its MAC is compared after that, and only with a `key`. Raises
    ManifestChangedError, CorruptError and ConfigurationError for a signed manifest that cannot be
    used, and the errors of the sources and of the key.
    """
    name = redact_uri(sources.join(bundle_uri, MANIFEST))
    try:
        source = sources.open_source(sources.join(bundle_uri, MANIFEST), access)
    except NotFoundError as error:
        raise ManifestChangedError(
            f"{error.message} {SIGNATURE} says that there was one.", hint=HINT
        ) from error
    try:
        # A larger one cannot be the signed one either: no release would have taken it.
        data = b"" if source.size > MAX_MANIFEST_BYTES else source.read(0, source.size)
    finally:
        source.close()
    if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), signature.manifest_sha256):
        raise ManifestChangedError(
            f"{name} is not the file that was signed by {signature.by}: its SHA-256 is not the one "
            f"in {SIGNATURE}.",
            hint="If its recipients were changed, sign it again: `tensorserve sign URI --sign-key "
            "KEY`. If nobody of yours has changed it, check who can write to this storage.",
        )
    return parse_manifest(data, name, key, pin=signature.manifest_sha256)


def check_files(
    manifest: Manifest, signature: ModelSignature, bundle_uri: str, access: Access
) -> None:
    """Raises SignatureError unless the files that the signed `manifest` names are the signed ones.

    Small files are read, up to 8 at a time; of .tensors files the size is asked for. Raises the
    sources' errors.
    """
    if sum(entry.size for entry in manifest.files) > MAX_TOTAL_BYTES:
        return  # refused where they are copied, before they are read

    def found(entry: FileEntry) -> str | None:
        uri = sources.join(bundle_uri, entry.name)
        stated = signature.files.get(entry.name, entry.sha256)
        if stated != entry.sha256:
            return f"{SIGNATURE} and {MANIFEST} contradict each other"
        return _difference(uri, access, entry.size, stated)

    def measured(name: str) -> str | None:
        uri = sources.join(bundle_uri, name)
        return _difference(uri, access, manifest.tensors_files[name].size, None)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tensorserve-signed") as pool:
        small = zip(manifest.files, pool.map(found, manifest.files), strict=True)
        large = zip(manifest.tensors_files, pool.map(measured, manifest.tensors_files), strict=True)
        changed = {entry.name: why for entry, why in small if why is not None}
        changed |= {name: why for name, why in large if why is not None}
    if changed:
        named = [f"{name} ({why})" for name, why in list(changed.items())[:_MAX_NAMED]]
        more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
        raise SignatureError(
            f"{redact_uri(bundle_uri)} is not the bundle that was signed by {signature.by}: "
            f"{', '.join(named)}{more}.",
            hint="Copy the whole bundle again from where it was signed, and check who can write to "
            "this storage.",
        )


def _difference(uri: str, access: Access, size: int, sha256: str | None) -> str | None:
    """What is wrong with the file at `uri`, if anything; it is read where `sha256` is given."""
    try:
        source = sources.open_source(uri, access)
    except NotFoundError:
        return "missing"
    try:
        if source.size != size:
            return f"{source.size} bytes instead of {size}"
        differs = sha256 is not None and digest_of(source) != sha256
        return "its SHA-256 is another" if differs else None
    finally:
        source.close()
