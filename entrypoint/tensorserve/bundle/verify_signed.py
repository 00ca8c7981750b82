"""Is every file of a bundle the one that was signed? For `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tensorserve import sources
from tensorserve.bundle.file_digest import Progress, sha256_of
from tensorserve.bundle.file_result import DAMAGED, OK, FileResult
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, FileEntry
from tensorserve.bundle.model_signature import ModelSignature
from tensorserve.sources import Access, NotFoundError


def compare_signed(
    results: Iterable[FileResult],
    signature: ModelSignature,
    bundle: str,
    access: Access,
    progress: Progress | None,
    *,
    whole: bool,
) -> Iterator[FileResult]:
    """`results` of a bundle's files, each compared with the `signature`; then who signed.

    `signature` is valid, and manifest.json is the signed one. Large files are read once more, for
    the SHA-256 of their bytes. `whole`: signed files that are in none of `results` are looked for.
    """

    def digest(name: str) -> str:
        return sha256_of(sources.join(bundle, name), access, progress=progress)

    seen = {MANIFEST}
    for result in results:
        if result.name == SIGNATURE:
            continue
        seen.add(result.name)
        stated = signature.files.get(result.name)
        if result.state == DAMAGED or stated is None:
            yield result
        elif result.name == MANIFEST:
            yield replace(result, state=OK, detail=f"{result.detail}, as signed")
        else:
            entry = result.entry
            found = entry.sha256 if isinstance(entry, FileEntry) else digest(result.name)
            yield _compared(result, fits=found == stated)
    for name in sorted(set(signature.files) - seen) if whole else ():
        try:
            found = digest(name)
        except NotFoundError:
            yield FileResult(name, DAMAGED, "signed, and missing")
        else:
            yield _compared(FileResult(name, OK, "the file"), fits=found == signature.files[name])
    yield FileResult(SIGNATURE, OK, f"signed by {signature.by}")


def _compared(result: FileResult, *, fits: bool) -> FileResult:
    if not fits:
        return FileResult(result.name, DAMAGED, "its SHA-256 is not the signed one")
    return replace(result, state=OK, detail=f"{result.detail}, as signed")
