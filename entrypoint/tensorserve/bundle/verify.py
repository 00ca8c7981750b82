"""Is every byte of a bundle what was packed: tags, digests, sizes?

The whole bundle is read, with bounded memory, and all damage is reported, not only the first. The
result describes each intact file as a manifest does; `sign` (packing/sign.py) writes those entries.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tensorserve import sources
from tensorserve.bundle.compiled import SealedCache, fingerprint_in
from tensorserve.bundle.download import KNOWN_NAMES, STAND_IN_SUFFIX
from tensorserve.bundle.engine_fingerprint import MOST_RANKS
from tensorserve.bundle.file_result import DAMAGED, OK, UNCHECKED, FileResult
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.layout import is_rank_layout, loadable
from tensorserve.bundle.location import SHARD_PATTERN, shard_name, split_model_uri
from tensorserve.bundle.manifest import (
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Manifest,
    TensorsEntry,
    check_index,
    manifest_line,
)
from tensorserve.bundle.model_signature import ModelSignature
from tensorserve.bundle.tensors_file import open_manifest, open_tensors
from tensorserve.bundle.trust import AUTO, DIGESTS, TAGS, verification_of
from tensorserve.bundle.verify_signed import compare_signed
from tensorserve.bundle.verify_tensors import Progress, check_contents
from tensorserve.crypto.ed25519 import VerifyingKey
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError, Source

# Bytes of a small file that are read at once.
_STEP = 8 * 1024**2
# Damaged tensors or files that a message names.
_MAX_NAMED = 5
# Suffixes of files that vLLM and transformers read beside the weights, in addition to KNOWN_NAMES.
_READ_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")


@dataclass(frozen=True)
class Verified:
    """A bundle without damage."""

    manifest: Manifest | None
    results: tuple[FileResult, ...]


def verify(
    uri: str,
    access: Access,
    key: ModelKey | None,
    on_line: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
    *,
    wish: str = AUTO,
    pin: str | None = None,
    compiled_key: ModelKey | None = None,
    compiled_signature_key: VerifyingKey | None = None,
    signature: ModelSignature | None = None,
) -> Verified:
    """Reads the bundle (or the single .tensors file) at `uri` and checks it completely.

    Calls `on_line` with each file's result as soon as it is known: one line, followed by one line
    for each of several damaged tensors. `wish` and `pin` are TENSORSERVE_VERIFY and
    TENSORSERVE_MANIFEST_SHA256. `compiled_key` authenticates sealed compiled code; None: `key`
    does. With a `signature`, each file is compared with it as well, which reads large files twice.
    Needs up to 9 buffers of 8 MiB.

    Raises CorruptError at the end if anything is damaged or missing. Raises at once: WrongKeyError,
    CorruptError for the manifest (invalid, or not authenticated although `wish` requires it),
    ConfigurationError (no key for an encrypted file, or a key for a plain one) and the sources'
    errors.
    """
    bundle, candidates = split_model_uri(uri)
    firsts = [c % 0 if SHARD_PATTERN.search(c) else c for c in candidates]
    manifest = open_manifest(bundle, access, key, firsts, pin=pin, wish=wish)
    single = candidates[0] if len(candidates) == 1 and not SHARD_PATTERN.search(uri) else None
    check = _Check(
        bundle, access, key, manifest, wish, progress, compiled_key or key, compiled_signature_key
    )
    results: list[FileResult] = []
    found: Iterable[FileResult] = check.all(single, candidates)
    if signature is not None:
        found = compare_signed(found, signature, bundle, access, progress, whole=single is None)
    for result in found:
        results.append(result)
        on_line(str(result))
    damaged = [result for result in results if result.state == DAMAGED]
    count = sum(result.name not in {MANIFEST, SIGNATURE} for result in results)
    if damaged:
        raise CorruptError(
            f"{redact_uri(uri)}: {len(damaged)} of {count} files are damaged: "
            + "; ".join(f"{result.name}: {result.detail}" for result in damaged),
            hint="Pack or copy the bundle again.",
        )
    return Verified(manifest, tuple(results))


@dataclass(frozen=True)
class _Check:
    """The arguments that the checks of all files share."""

    bundle: str
    access: Access
    key: ModelKey | None
    manifest: Manifest | None
    wish: str
    progress: Progress | None
    compiled_key: ModelKey | None
    compiled_signature_key: VerifyingKey | None

    def all(self, single: str | None, candidates: tuple[str, ...]) -> Iterator[FileResult]:
        """Checks each file, the .tensors files first, and yields its result."""
        # The URI of a single file says nothing about its neighbours, which may be unreadable.
        listing = sources.list_names(self.bundle, self.access) if single is None else None
        manifest = self.manifest
        if single is not None:
            tensors = [single]
        elif manifest is not None:
            tensors = list(manifest.tensors_files)
        else:
            tensors = _tensors_without_manifest(self.bundle, candidates, listing, self.access)
        for name in tensors:
            yield _check_tensors(self, name)
        if single is not None:
            if manifest is not None and single in manifest.tensors_files:
                yield _manifest_result(manifest, sealed=self.key is not None)
            return
        entries = {entry.name: entry for entry in manifest.files} if manifest else {}
        for entry in entries.values():
            yield _check_file(self.bundle, entry, self.access)
        if manifest is not None or self.key is not None:
            yield _manifest_result(manifest, sealed=self.key is not None)
        for name in sorted(set(listing or ()) - {*entries, *tensors, MANIFEST}):
            if (fingerprint := fingerprint_in(name)) is not None:
                yield _check_compiled(self, name, fingerprint)
                continue
            if name == SIGNATURE:
                yield FileResult(name, UNCHECKED, "no key was given to compare the signature with")
                continue
            why = f"not in {MANIFEST}" if manifest else f"the bundle has no {MANIFEST}"
            yield FileResult(name, UNCHECKED, why)


def _manifest_result(manifest: Manifest | None, *, sealed: bool) -> FileResult:
    """How the manifest is authenticated, with its SHA-256 for TENSORSERVE_MANIFEST_SHA256."""
    advice = (
        "`tensorserve sign` adds one that the key authenticates"
        if sealed
        else "nothing is encrypted"
    )
    if manifest is None:
        return FileResult(MANIFEST, UNCHECKED, f"there is none; {advice}")
    said = (
        f"version {manifest.version}, {manifest_line(manifest.sha256, manifest.authenticated_by)}"
    )
    if manifest.authenticated_by:
        return FileResult(MANIFEST, OK, said)
    return FileResult(MANIFEST, UNCHECKED, f"{said}; {advice}")


def _tensors_without_manifest(
    bundle: str, candidates: tuple[str, ...], listing: dict[str, int] | None, access: Access
) -> list[str]:
    if listing is not None:
        found = sorted(name for name in listing if name.endswith(".tensors"))
    else:
        # The source cannot list: names are requested until one is missing.
        found = []
        for candidate in candidates:
            rank = 0
            while not found or rank:
                name = shard_name(candidate, rank)
                try:
                    sources.open_source(sources.join(bundle, name), access).close()
                except (NotFoundError, ForbiddenError):
                    break
                found.append(name)
                if name == candidate or rank == MOST_RANKS:
                    break
                rank += 1
    if not found:
        raise NotFoundError(
            f"{redact_uri(bundle)} has neither a {MANIFEST} nor a .tensors file.",
            hint="Give the URI of a bundle's directory, or of a .tensors file.",
        )
    return found


def _check_file(bundle: str, entry: FileEntry, access: Access) -> FileResult:
    try:
        found = describe_file(bundle, entry.name, access)
    except NotFoundError:
        return FileResult(entry.name, DAMAGED, "missing")
    if found.size != entry.size:
        detail = f"{found.size} bytes, {MANIFEST} says {entry.size}"
        return FileResult(entry.name, DAMAGED, detail)
    if found.sha256 != entry.sha256:
        return FileResult(entry.name, DAMAGED, f"its SHA-256 is not the one in {MANIFEST}")
    return FileResult(entry.name, OK, f"{entry.size} bytes, SHA-256 fits", entry=entry)


class _Sequence(io.RawIOBase):
    """A source as a file that is read from its beginning to its end."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._offset = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._source.size - self._offset]
        if view:
            self._source.read_into(self._offset, view)
        self._offset += len(view)
        return len(view)


def _check_compiled(check: _Check, name: str, fingerprint: str) -> FileResult:
    """Whether a server whose engine has this `fingerprint` would believe the sealed code."""
    if check.compiled_key is None:
        return FileResult(name, UNCHECKED, "compiled code; no key was given")
    source = sources.open_source(sources.join(check.bundle, name), check.access)
    try:
        cache = SealedCache.authenticate(
            io.BufferedReader(_Sequence(source), _STEP),
            source.size,
            name,
            fingerprint=fingerprint,
            key=check.compiled_key,
            verifying_key=check.compiled_signature_key,
        )
    except (CorruptError, WrongKeyError, ConfigurationError) as error:
        return FileResult(name, DAMAGED, error.message)
    finally:
        source.close()
    contents = cache.contents
    signed = "not signed"
    if contents.signed:
        compared = check.compiled_signature_key is not None
        signed = "its signature fits" if compared else "signed; no key was given to compare with"
    return FileResult(
        name,
        OK,
        f"compiled code, {contents.files} files, {contents.files_bytes / 1e6:.1f} MB, "
        f"authenticated, {signed}",
    )


def check_files_in_place(directory: str, manifest: Manifest, *, remote_code: bool) -> None:
    """Raises CorruptError unless vLLM would read only files of the manifest in `directory`.

    For a vLLM that was started without `tensorserve up` and reads the small files in place, in a
    bundle on a disk. Files that the manifest lacks are refused if vLLM would read them: Python
    files only with `remote_code`, .safetensors files only if the manifest has stand-ins (older
    bundles have none).
    """
    access = Access()
    results = [_check_file(directory, entry, access) for entry in manifest.files]
    wrong = {result.name: result.detail for result in results if result.state == DAMAGED}
    named = {entry.name for entry in manifest.files} | {MANIFEST}
    suffixes: tuple[str, ...] = _READ_SUFFIXES
    if any(name.endswith(STAND_IN_SUFFIX) for name in named):
        suffixes += (STAND_IN_SUFFIX,)
    for name in sources.list_names(directory, access) or ():
        hidden = any(part.startswith(".") for part in name.split("/"))
        read = name in KNOWN_NAMES or (name.endswith(suffixes) and not name.endswith(".index.json"))
        if name not in named and not hidden and (read or (remote_code and name.endswith(".py"))):
            wrong[name] = f"not in {MANIFEST}"
    if wrong:
        said = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:_MAX_NAMED])
        raise CorruptError(
            f"{directory} has files that differ from the packed bundle: {said}.",
            hint="Copy the whole bundle again. If the files are intended, pack the model again.",
        )


def describe_file(bundle: str, name: str, access: Access) -> FileEntry:
    """The manifest entry of the small file `name`. Raises the sources' errors."""
    source = sources.open_source(sources.join(bundle, name), access)
    digest = hashlib.sha256()
    try:
        for offset in range(0, source.size, _STEP):
            digest.update(source.read(offset, min(_STEP, source.size - offset)))
        return FileEntry(name, source.size, digest.hexdigest())
    finally:
        source.close()


def _check_tensors(check: _Check, name: str) -> FileResult:
    manifest = check.manifest
    if (
        manifest is not None
        and not manifest.authenticated_by
        and name not in manifest.tensors_files
    ):
        manifest = None  # the file is not part of the bundle
    try:
        opened = open_tensors(sources.join(check.bundle, name), check.access, check.key)
    except NotFoundError:
        return FileResult(name, DAMAGED, "missing")
    except WrongKeyError:
        raise  # no other file can be checked either
    except CorruptError as error:
        return FileResult(name, DAMAGED, error.message)
    index = opened.index
    entry = manifest.tensors_files.get(name) if manifest else None
    try:
        rule = verification_of(
            check.wish, manifest, name, encrypted=index.encrypted, pinned=opened.source.pinned
        )
        problems = []
        try:
            loadable(index)
        except CorruptError as error:
            problems.append(error.message)
        if manifest is not None:
            try:
                check_index(manifest, name, index)
            except CorruptError as error:
                problems.append(error.message)
        expected = entry.digests if entry else None
        contents = check_contents(opened.source, index, check.key, expected, check.progress)
    finally:
        opened.source.close()
    damaged = contents.damaged
    if damaged:
        named = ", ".join(repr(tensor) for tensor in list(damaged)[:_MAX_NAMED])
        more = f" and {len(damaged) - _MAX_NAMED} more" if len(damaged) > _MAX_NAMED else ""
        first = next(iter(damaged.values()))
        problems.append(f"{len(damaged)} of {len(index.tensors)} tensors: {named}{more} ({first})")
    elif entry is not None and contents.headers_sha256 != entry.headers_sha256:
        problems.append(
            f"the tensors' headers (hashes, nonces, tags) are not the ones in {MANIFEST}: "
            "tensors were replaced by others under the same key"
        )
    if contents.undigested and rule.mode == DIGESTS:
        problems.append(
            f"{contents.undigested} of {len(index.tensors)} tensors are encrypted, but neither an "
            f"authenticated {MANIFEST} nor a SHA-256 identifies them: they may have been "
            "exchanged for one another (TENSORSERVE_VERIFY=tags accepts that)"
        )
    if problems:
        every = tuple(f"{tensor!r}: {why}" for tensor, why in damaged.items())
        return FileResult(name, DAMAGED, "; ".join(problems), every if len(every) > 1 else ())
    fits = "tags alone" if rule.mode == TAGS and contents.undigested else "every digest fits"
    secured = f"every chunk authenticated, {fits}" if index.encrypted else f"{fits}, not encrypted"
    size = f"{index.data_bytes / 1e6:.1f} MB"
    found = TensorsEntry(
        size=index.size,
        tensors=len(index.tensors),
        data_bytes=index.data_bytes,
        index_sha256=index.digest,
        headers_sha256=contents.headers_sha256,
        digests=contents.digests if index.encrypted else None,
    )
    return FileResult(
        name,
        OK,
        f"{len(index.tensors)} tensors, {size}, {secured}",
        entry=found,
        sealed=contents.sealed,
        for_rank=is_rank_layout(index),
    )
