"""How does a key by reference become the model's key of the settings?

Once for a start, before anything is opened. From then on it is a key as one that was given: in
memory, handed over as secrets are.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from typing import TypeVar

from tensorserve.bundle.manifest import MANIFEST, Manifest, read_manifest
from tensorserve.bundle.wrapped_keys import WrappedKeys
from tensorserve.config.access import access_for, services_for
from tensorserve.config.settings import SourceSettings
from tensorserve.config.signature import with_signature
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.secret import redact_uri
from tensorserve.sources import join
from tensorserve.wrapping.base import Reference, VaultAccess, fingerprint_of
from tensorserve.wrapping.unwrap import Unwrapped, unwrap_key

Given = TypeVar("Given", bound=SourceSettings)


def with_key(settings: Given, bundle_uri: str) -> Given:
    """`settings` with the key of the bundle at `bundle_uri`, if it is by reference.

    Where the settings ask for a signature, it is checked first, before any service is asked.
    Without a key, a passphrase and a reference, the manifest may name a service that is set up
    here; else the settings are given back as they are. Raises WrongKeyError where the key is not
    wrapped for this reference or has another fingerprint, CorruptError where the manifest has no
    wrapped keys, ConfigurationError, and the signature's, the providers' and the sources' errors.
    """
    settings = with_signature(settings, bundle_uri)
    if settings.key is not None:
        _check_fingerprint(settings, settings.key.reveal(), settings.key.origin)
        return settings
    if settings.passphrase is not None:
        return settings
    name = redact_uri(join(bundle_uri, MANIFEST))
    manifest = _read(settings, bundle_uri)
    found = None if manifest is None else manifest.wrapped_keys
    if manifest is None or found is None:
        if settings.key_uri is not None:
            raise _nothing_wrapped(settings.key_uri, name, manifest)
        return settings
    unwrapped = _unwrap(settings, manifest, found, name)
    _check_fingerprint(settings, unwrapped.key.reveal(), unwrapped.by)
    # The credentials have done their work.
    return replace(settings, key=unwrapped.key, vault=VaultAccess())


def _read(settings: SourceSettings, bundle_uri: str) -> Manifest | None:
    """The manifest, not authenticated but for a pin."""
    # Where nothing asks for a key, 403 is taken for no manifest, as for any plain bundle.
    return read_manifest(
        bundle_uri,
        access_for(settings),
        None,
        pin=settings.manifest_sha256,
        may_be_hidden=settings.key_uri is None,
    )


def _unwrap(
    settings: SourceSettings, manifest: Manifest, found: WrappedKeys, name: str
) -> Unwrapped:
    assert manifest.parameters is not None
    given = settings.key_uri
    unwrapped = unwrap_key(
        found.recipients,
        found.binding(manifest.parameters.salt),
        None if given is None else Reference.parse(given, "TENSORSERVE_KEY_URI"),
        services_for(settings),
        name,
    )
    pinned = settings.manifest_sha256 or settings.key_fingerprint
    if not unwrapped.proves_sender and pinned is None:
        raise ConfigurationError(
            f"{unwrapped.by} has a public key: anybody can wrap a key of his own for it, and so "
            "put a bundle of his own in the place of yours.",
            hint="Set TENSORSERVE_KEY_FINGERPRINT to what `tensorserve pack --wrap` or `rewrap` "
            "printed, or TENSORSERVE_MANIFEST_SHA256.",
        )
    return unwrapped


def _check_fingerprint(settings: SourceSettings, key: bytes, origin: str) -> None:
    wanted = settings.key_fingerprint
    if wanted is None or hmac.compare_digest(fingerprint_of(key), wanted):
        return
    raise WrongKeyError(
        f"The key from {origin} has the fingerprint {fingerprint_of(key)}, "
        f"TENSORSERVE_KEY_FINGERPRINT is {wanted}: it is another model's key.",
        hint="If the bundle is the right one, set the variable to what `tensorserve pack --wrap` "
        "or `rewrap` printed for it; if not, it was replaced.",
    )


def _nothing_wrapped(key_uri: str, name: str, manifest: Manifest | None) -> CorruptError:
    what = "there is none" if manifest is None else "it holds no wrapped key"
    return CorruptError(
        f"TENSORSERVE_KEY_URI={redact_uri(key_uri)} asks for the key that is wrapped in {name}, "
        f"and {what}.",
        hint="If it held one, it was replaced: copy the bundle again. If the bundle never had one, "
        "add it: `tensorserve rewrap URI --add …`, with the key.",
    )
