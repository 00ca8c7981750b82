"""Must the bundle be signed, and by whom? Checked before its key is asked for.

From then on the signed manifest.json is the only one that is believed, in every process of the
start: its SHA-256 becomes that of the settings, as if the user had pinned it.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import replace
from typing import TypeVar

from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.model_signature import ModelSignature, read_signature
from tensorserve.bundle.signature_trust import Trust, TrustedCertificates, TrustedKeys
from tensorserve.bundle.signed_bundle import ManifestChangedError, check_files, check_manifest
from tensorserve.config.access import access_for
from tensorserve.config.settings import SourceSettings
from tensorserve.errors import SignatureError

Given = TypeVar("Given", bound=SourceSettings)
# `rewrap` and `sign` replace manifest.json and model.sig one after the other.
_REPLACING_SECONDS = 1.0


def trust_for(settings: SourceSettings) -> Trust | None:
    """Whose signature the settings ask for; None: no signature is needed."""
    if settings.signature_key is not None:
        return TrustedKeys.parse(settings.signature_key)
    if settings.signature_certificates is not None:
        return TrustedCertificates.parse(settings.signature_certificates)
    if settings.signature_identity is not None:
        from tensorserve.bundle.sigstore_trust import TrustedIdentity

        issuer, root = settings.signature_issuer, settings.signature_trust_root
        assert issuer is not None  # config/key_settings.py
        assert root is not None
        return TrustedIdentity.parse(settings.signature_identity, issuer, root)
    return None


def without_trust(settings: Given) -> Given:
    """`settings` that ask for no signature, for a bundle that is about to be signed."""
    return replace(
        settings, signature_key=None, signature_certificates=None, signature_identity=None
    )


def with_signature(settings: Given, bundle_uri: str) -> Given:
    """`settings` with the signer of the bundle at `bundle_uri`, where they ask for a signature.

    Raises SignatureError for a bundle that is not signed, not by an accepted signer, or is not
    what was signed, as far as it can be told before the weights are read; and the sources' errors.
    """
    if settings.signed_by is not None or trust_for(settings) is None:
        return settings
    try:
        signature = _read_signed(settings, bundle_uri)
    except ManifestChangedError:
        # One more look, in case it was read between the two.
        time.sleep(_REPLACING_SECONDS)
        signature = _read_signed(settings, bundle_uri)
    pin = settings.manifest_sha256
    if pin is not None and not hmac.compare_digest(pin, signature.manifest_sha256):
        raise SignatureError(
            f"The signed {MANIFEST} has the SHA-256 {signature.manifest_sha256}, "
            f"TENSORSERVE_MANIFEST_SHA256 is {pin}: another bundle was signed.",
            hint="`tensorserve verify` prints the SHA-256 of a bundle's manifest.json.",
        )
    return replace(
        with_digests(settings), manifest_sha256=signature.manifest_sha256, signed_by=signature.by
    )


def with_digests(settings: Given) -> Given:
    """`settings` for what is signed: digests are compared unless they ask for something else.

    Tags bind only those who have no key; a signature is for those who have it and cannot sign.
    """
    return replace(settings, verify="hashes") if settings.verify == "auto" else settings


def _read_signed(settings: SourceSettings, bundle_uri: str) -> ModelSignature:
    """The signature that the settings ask for. Raises as `with_signature`."""
    trust = trust_for(settings)
    assert trust is not None
    access = access_for(settings)
    signature = read_signature(bundle_uri, access, trust)
    check_files(check_manifest(signature, bundle_uri, access), signature, bundle_uri, access)
    return signature
