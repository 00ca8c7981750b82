"""What vouches for a .tensors file, and what is therefore checked as its tensors come?

The one place that decides it, for every way into vLLM. What each is worth: docs/threat-model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.manifest import Manifest

if TYPE_CHECKING:
    # One imports torch, the other this module.
    from tensorserve.loading import LoadOptions
    from tensorserve.start import Shard

# What TENSORSERVE_VERIFY may be.
AUTO, HASHES, MANIFEST_ONLY, TAGS_ONLY = WISHES = ("auto", "hashes", "manifest", "tags")
# What vouches for a file: a manifest with the key's MAC or the user's pin; each tensor's own
# SHA-256, which says nothing of who wrote it; the tags of its chunks alone; nothing.
MANIFEST_VOUCHES, DIGESTS, TAGS, NOTHING = MODES = ("manifest", "digests", "tags", "none")

WARNINGS = {
    DIGESTS: "no authenticated manifest: the weights are held to the digests in their own file, "
    "and nothing vouches for configuration and tokenizer. Give the bundle a manifest: "
    "`tensorserve sign URI`.",
    TAGS: "TENSORSERVE_VERIFY=tags, and no authenticated manifest: whoever can write where the "
    "model is stored can exchange its tensors for one another. Give the bundle a manifest: "
    "`tensorserve sign URI`.",
}
"""What a start says aloud about an encrypted model, by mode."""


@dataclass(frozen=True, slots=True)
class Verification:
    """For one file."""

    mode: str  # one of MODES
    digests: bool  # whether each tensor is hashed and compared as it comes


def verification_of(
    wish: str, manifest: Manifest | None, name: str, *, encrypted: bool, pinned: bool
) -> Verification:
    """For file `name` of the bundle with this `manifest`, as the user wishes (one of WISHES).

    No wish makes an authenticated manifest needless where there is one: read_manifest saw to it.
    Not `pinned`: the source cannot name a version of the file, so that two reads may be of two
    versions. Tags tell it of a sealed file's tensors, digests of a plain one's; between tensors the
    stream compares the headers (loading.TensorStream). With MANIFEST_ONLY, raises CorruptError for
    a sealed file that no manifest vouches for, ConfigurationError for a plain one.
    """
    if manifest is not None and manifest.vouched_by and name in manifest.tensors_files:
        # It binds tags and, in plain files, which have none, digests: those are then to be
        # compared, whatever is wished of tags. Who gave a pin wants that bundle's data.
        return Verification(MANIFEST_VOUCHES, wish == HASHES or not encrypted)
    if wish == MANIFEST_ONLY:
        _refuse_unvouched(manifest, name, encrypted=encrypted)
    if not encrypted:
        # Against damage and mixtures; anybody can write those.
        return Verification(NOTHING, wish == HASHES or not pinned)
    return Verification(TAGS, False) if wish == TAGS_ONLY else Verification(DIGESTS, True)


def _refuse_unvouched(manifest: Manifest | None, name: str, *, encrypted: bool) -> NoReturn:
    found = "the bundle has none"
    if manifest is not None:
        found = "nobody vouches for this bundle's"
        if manifest.vouched_by:
            found = "this bundle's does not name it"
    said = f"TENSORSERVE_VERIFY=manifest asks for a manifest.json that vouches for {name}; {found}"
    if encrypted:
        raise CorruptError(
            f"{said}.",
            hint="If the bundle had one, somebody took it away: copy the whole bundle again from "
            "where it was packed, and look who can write here. If it never had one: `tensorserve "
            "sign URI`.",
        )
    raise ConfigurationError(
        f"{said}. It is not encrypted: without a key only a pin can.",
        hint="Set TENSORSERVE_MANIFEST_SHA256 to what `tensorserve pack` or `verify` prints.",
    )


def checked_as(
    options: LoadOptions,
    shard: Shard,
    index: FileIndex,
    records: Sequence[TensorRecord],
    source_name: str,
) -> LoadOptions:
    """`options` for a load of `records` that compares all that the checks found of `shard`.

    Raises CorruptError if `index`, read by the loader, is not the one that was checked.
    """
    check_same_index(shard, index, source_name)
    digests: dict[int, bytes] = {}
    if shard.digests is not None:
        every = bytes.fromhex(shard.digests)
        digests = {
            r.header_offset: every[32 * n : 32 * n + 32] for n, r in enumerate(index.tensors)
        }
    return replace(
        options,
        verify_hashes=shard.check_digests,
        digests=digests,
        headers_sha256=shard.headers_sha256,
        left_out=left_out(index, records),
    )


def check_same_index(shard: Shard, index: FileIndex, source_name: str) -> None:
    """Raises CorruptError if `index` is not the one that was checked: before anything is decided
    by it, for a server may answer each opening otherwise.
    """
    if shard.index_sha256 not in {None, index.digest}:
        raise CorruptError(
            f"The index of {source_name} is not the one that this start checked.",
            hint="Start again; upload models under a new name instead of over an old one.",
        )


def left_out(index: FileIndex, records: Sequence[TensorRecord]) -> tuple[TensorRecord, ...]:
    """The tensors of the file that are not among `records`."""
    taken = {record.header_offset for record in records}
    return tuple(record for record in index.tensors if record.header_offset not in taken)
