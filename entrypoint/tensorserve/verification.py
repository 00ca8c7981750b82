"""What vouches for a .tensors file, and what is therefore to be checked as its tensors come?

The one place that decides it, for every way into vLLM. What each is worth: docs/threat-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.manifest import Manifest

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
