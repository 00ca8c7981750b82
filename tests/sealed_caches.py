"""Sealed caches for tests: of good files, and of archives that only who has the key can make."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from tensorserve.bundle.compiled import Contents, SealedCache, seal
from tensorserve.bundle.compiled_archive import files_below, pack_files, unpack_files
from tensorserve.bundle.keys import GivenKey, ModelKey
from tensorserve.crypto.ed25519 import SigningKey, VerifyingKey

KEY = GivenKey(bytes(range(32)), "the test")
FINGERPRINT = "5e" * 32


def sealed_files(
    files: dict[str, bytes], directory: Path, *, fingerprint: str = FINGERPRINT, key: ModelKey = KEY
) -> bytes:
    """A sealed cache with `files`, made in `directory` as `tensorserve precompile` makes it."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    archive = io.BytesIO()
    contents = pack_files(directory, files_below(directory), archive)
    return sealed_archive(archive.getvalue(), contents, fingerprint=fingerprint, key=key)


def sealed_archive(
    archive: bytes,
    contents: Contents,
    *,
    fingerprint: str = FINGERPRINT,
    key: ModelKey = KEY,
    signing_key: SigningKey | None = None,
) -> bytes:
    """A sealed cache with `archive`, whatever that is."""
    out = io.BytesIO()
    seal(
        io.BytesIO(archive),
        out,
        contents,
        fingerprint=fingerprint,
        key=key,
        derivation=None,
        signing_key=signing_key,
    )
    return out.getvalue()


def archive_of(*members: tarfile.TarInfo, data: bytes = b"x") -> tuple[bytes, Contents]:
    """(archive, contents) with `members`; each regular file holds `data`."""
    out, files, total = io.BytesIO(), 0, 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if member.type == tarfile.REGTYPE:
                member.size = len(data)
                files, total = files + 1, total + len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = gzip.compress(out.getvalue())
    return packed, Contents(len(packed), files, total)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """One member of an archive."""
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def opened(
    sealed: bytes,
    directory: Path,
    *,
    fingerprint: str = FINGERPRINT,
    key: ModelKey = KEY,
    verifying_key: VerifyingKey | None = None,
) -> None:
    """Authenticates `sealed` and unpacks it below `directory`."""
    cache = SealedCache.authenticate(
        io.BytesIO(sealed),
        len(sealed),
        "the cache",
        fingerprint=fingerprint,
        key=key,
        verifying_key=verifying_key,
    )
    unpack_files(cache.chunks(), cache.contents, directory, "the cache")
