"""How does `tensorserve rewrap URI` change who can unwrap a bundle's key?

Only manifest.json is written, in one step, and only if it is still the one that was read. The
weights, the other files and compiled code stay as they are. Recipients are a part of what a
signature covers: a signed bundle is signed again, from what its signature says of the other files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tensorserve import sources
from tensorserve.bundle.keys import GivenKey, ModelKey
from tensorserve.bundle.manifest import (
    KEY,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    manifest_line,
    parse_manifest,
    rewrapped,
    wrapping_parameters,
)
from tensorserve.bundle.model_signature import read_signature
from tensorserve.bundle.signature_trust import Trust
from tensorserve.bundle.signed_bundle import check_manifest
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.packing.destination import refuse_unwritable, replace_version, version_of
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.packing.recipients import without, wrapped_for
from tensorserve.packing.sign import refuse_signed
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access, NotFoundError
from tensorserve.wrapping.base import Services
from tensorserve.wrapping.providers import for_wrapping


@dataclass(frozen=True)
class Rewrapped:
    """Who can unwrap the key now. ``str()`` gives the lines for the terminal."""

    bundle: str  # redacted
    recipients: tuple[str, ...]
    removed: tuple[str, ...]
    fingerprint: str
    sha256: str  # of manifest.json
    signed_by: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.bundle}: the key is wrapped for {', '.join(self.recipients)}"]
        if self.removed:
            lines.append(
                f"  no longer for {', '.join(self.removed)}; who has unwrapped the key, or has an "
                "old manifest.json and its wrapping key, can still read this bundle"
            )
        lines.append(f"  key fingerprint: {self.fingerprint}")
        lines.append(f"  {MANIFEST}: {manifest_line(self.sha256, KEY)}")
        if self.signed_by is not None:
            lines.append(f"  {SIGNATURE}: signed by {self.signed_by}")
        return "\n".join(lines)


def rewrap(
    uri: str,
    access: Access,
    key: ModelKey | None,
    services: Services,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    pin: str | None = None,
    signer: BundleSigner | None = None,
    trust: Trust | None = None,
) -> Rewrapped:
    """Wraps the `key` of the bundle at `uri` for `add`, and takes `remove` out of its manifest.

    A signed bundle needs a `signer`: it signs what the signature that is there covers, which has
    to be of one whom `trust` accepts (None: of the signer himself), with the new manifest.

    Raises SignatureError where that signature does not hold; UsageError for a single file, a
    `remove` that is no recipient, and where nobody would be left; ConfigurationError without a key,
    for a passphrase, for a manifest without a MAC, and for a signed bundle without a signer;
    CorruptError where the manifest is not this key's or was replaced meanwhile; and the providers'
    and the sources' errors.
    """
    if not add and not remove:
        raise UsageError("`rewrap` has nothing to do.", hint="Give --add or --remove.")
    if uri.endswith(".tensors"):
        raise UsageError(
            "`rewrap` is for a whole bundle, not a single file.",
            hint="Give the URI of the bundle's directory.",
        )
    refuse_unwritable(uri)
    if not isinstance(key, GivenKey):
        raise ConfigurationError(
            "`rewrap` needs the model's key"
            + ("." if key is None else "; a passphrase cannot be wrapped."),
            hint="Set TENSORSERVE_KEY_FILE, or TENSORSERVE_KEY_URI as one of its recipients.",
        )
    signed: dict[str, str] = {}
    signed_version = ""
    if signer is None:
        refuse_signed(uri, access, "`rewrap`")
    else:
        with suppress(NotFoundError):  # said better below
            signed_version = version_of(uri, SIGNATURE, access)
        signature = read_signature(uri, access, trust or signer.trust)
        check_manifest(signature, uri, access)
        signed = dict(signature.files)
    # Before it is read: what is written replaces this version or nothing.
    version = version_of(uri, MANIFEST, access)
    data, name = _read(uri, access)
    manifest = parse_manifest(data, name, key, pin=pin)
    if signer is not None and manifest.sha256 != signed[MANIFEST]:
        raise CorruptError(f"{name} was replaced while `rewrap` worked.", hint="Run it again.")
    parameters = wrapping_parameters(manifest, name)
    if parameters.derivation is not None:
        raise ConfigurationError(
            f"{name} is of a bundle with a passphrase, which cannot be wrapped.",
            hint="Pack the model again with a key.",
        )
    before = manifest.wrapped_keys.recipients if manifest.wrapped_keys else ()
    left = without(before, remove, services)
    providers = [for_wrapping(text, services) for text in add]
    if not left and not providers:
        raise UsageError(
            "Nobody would be left who can unwrap the key.", hint="Add another recipient first."
        )
    secret = Secret(key.reveal(), key.origin)
    wrapped = wrapped_for(providers, secret, parameters.salt, left)
    made = rewrapped(data, name, key, wrapped)
    sha256 = hashlib.sha256(made).hexdigest()
    # A module or a service that does not sign leaves the bundle as it is.
    again = None if signer is None else signer.sign(signed | {MANIFEST: sha256}, uri)
    replace_version(uri, MANIFEST, made, access, version)
    if again is not None:
        replace_version(uri, SIGNATURE, again, access, signed_version)
    now = tuple(map(str, wrapped.recipients))
    return Rewrapped(
        bundle=redact_uri(uri),
        recipients=now,
        removed=tuple(str(entry) for entry in before if str(entry) not in now),
        fingerprint=wrapped.fingerprint,
        sha256=sha256,
        signed_by=None if signer is None else str(signer.by),
    )


def _read(uri: str, access: Access) -> tuple[bytes, str]:
    source = sources.open_source(sources.join(uri, MANIFEST), access)
    try:
        if source.size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{source.name} is {source.size} bytes, too large for a manifest.")
        return source.read(0, source.size), source.name
    finally:
        source.close()
