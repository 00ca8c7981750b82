"""How does `tensorserve rewrap URI` change who can unwrap a bundle's key?

Only manifest.json is written, in one step, and only if it is still the one that was read. The
weights, the other files and compiled code stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tensorserve import sources
from tensorserve.bundle.keys import GivenKey, ModelKey
from tensorserve.bundle.manifest import (
    KEY,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    manifest_line,
    parse_manifest,
    rewrapped,
    wrapping_parameters,
)
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.packing.destination import refuse_unwritable, replace_version, version_of
from tensorserve.packing.recipients import without, wrapped_for
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import Access
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

    def __str__(self) -> str:
        lines = [f"{self.bundle}: the key is wrapped for {', '.join(self.recipients)}"]
        if self.removed:
            lines.append(
                f"  no longer for {', '.join(self.removed)}; who has unwrapped the key, or has an "
                "old manifest.json and its wrapping key, can still read this bundle"
            )
        lines.append(f"  key fingerprint: {self.fingerprint}")
        lines.append(f"  {MANIFEST}: {manifest_line(self.sha256, KEY)}")
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
) -> Rewrapped:
    """Wraps the `key` of the bundle at `uri` for `add`, and takes `remove` out of its manifest.

    Raises UsageError for a single file, a `remove` that is no recipient, and where nobody would be
    left;
    ConfigurationError without a key, for a passphrase and for a manifest without a MAC;
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
    # Before it is read: what is written replaces this version or nothing.
    version = version_of(uri, MANIFEST, access)
    data, name = _read(uri, access)
    manifest = parse_manifest(data, name, key, pin=pin)
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
    replace_version(uri, MANIFEST, made, access, version)
    now = tuple(map(str, wrapped.recipients))
    return Rewrapped(
        bundle=redact_uri(uri),
        recipients=now,
        removed=tuple(str(entry) for entry in before if str(entry) not in now),
        fingerprint=wrapped.fingerprint,
        sha256=hashlib.sha256(made).hexdigest(),
    )


def _read(uri: str, access: Access) -> tuple[bytes, str]:
    source = sources.open_source(sources.join(uri, MANIFEST), access)
    try:
        if source.size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{source.name} is {source.size} bytes, too large for a manifest.")
        return source.read(0, source.size), source.name
    finally:
        source.close()
