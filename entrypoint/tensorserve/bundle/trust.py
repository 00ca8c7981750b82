"""How is a .tensors file authenticated, and what must the loader therefore compare?

Every way into vLLM uses this decision. docs/threat-model.md compares the modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from tensorserve.bundle.manifest import Manifest
from tensorserve.errors import ConfigurationError, CorruptError

# Values of TENSORSERVE_VERIFY.
AUTO, HASHES, MANIFEST_ONLY, TAGS_ONLY = ("auto", "hashes", "manifest", "tags")
# How a file is authenticated: by a manifest with the key's MAC or the user's pin; by each tensor's
# own SHA-256 in the file, which says nothing about its author; by the tags of its chunks alone;
# not at all.
BY_MANIFEST, DIGESTS, TAGS, NOTHING = MODES = ("manifest", "digests", "tags", "none")

WARNINGS = {
    DIGESTS: "no authenticated manifest: the weights are compared with the digests in their own "
    "file; configuration and tokenizer are not authenticated. Add a manifest: "
    "`tensorserve sign URI`.",
    TAGS: "TENSORSERVE_VERIFY=tags, and no authenticated manifest: anybody who can write to the "
    "model's storage can exchange its tensors for one another. Add a manifest: "
    "`tensorserve sign URI`.",
}
"""The warning that a start prints for an encrypted model, by mode."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How one file is authenticated while it is loaded."""

    mode: str  # one of MODES
    digests: bool  # whether each tensor is hashed and its digest compared


def verification_of(
    wish: str, manifest: Manifest | None, name: str, *, encrypted: bool, pinned: bool
) -> Verification:
    """The verification of file `name` in the bundle with `manifest`. `wish` is TENSORSERVE_VERIFY.

    An authenticated manifest is used whatever `wish` is. `pinned`: the source can name a version
    of the file, so that all reads are of one version. Without it, a mixture of versions is found
    by the tags of an encrypted file and by the digests of a plain one; tensors of different
    versions are found by the headers' digest (loading.TensorStream).

    With MANIFEST_ONLY and no authenticated manifest for the file, raises CorruptError if it is
    encrypted and ConfigurationError if it is plain.
    """
    if manifest is not None and manifest.authenticated_by and name in manifest.tensors_files:
        # The manifest authenticates the tensor headers: tags of an encrypted file, digests of a
        # plain one. A plain file has no tags, so its digests must be compared.
        return Verification(BY_MANIFEST, wish == HASHES or not encrypted)
    if wish == MANIFEST_ONLY:
        _refuse_unauthenticated(manifest, name, encrypted=encrypted)
    if not encrypted:
        # Digests find damage and mixed versions here; anybody can write a file with valid digests.
        return Verification(NOTHING, wish == HASHES or not pinned)
    return Verification(TAGS, False) if wish == TAGS_ONLY else Verification(DIGESTS, True)


def _refuse_unauthenticated(manifest: Manifest | None, name: str, *, encrypted: bool) -> NoReturn:
    found = "the bundle has none"
    if manifest is not None:
        found = "this bundle's is not authenticated"
        if manifest.authenticated_by:
            found = "this bundle's does not name it"
    said = (
        f"TENSORSERVE_VERIFY=manifest requires an authenticated manifest.json for {name}; {found}"
    )
    if encrypted:
        raise CorruptError(
            f"{said}.",
            hint="If the bundle had one, somebody removed it: copy the whole bundle again from "
            "where it was packed, and check who can write to this storage. If it never had one: "
            "`tensorserve sign URI`.",
        )
    raise ConfigurationError(
        f"{said}. The weights are not encrypted: only a pin can authenticate their manifest.",
        hint="Set TENSORSERVE_MANIFEST_SHA256 to what `tensorserve pack` or `verify` prints.",
    )
