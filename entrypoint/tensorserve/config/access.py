"""With which access and which key are the files read that the settings name?"""

from __future__ import annotations

from tensorserve.bundle.keys import GivenKey, ModelKey, parse_passphrase
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.errors import TensorserveError
from tensorserve.sources import Access, RetryPolicy
from tensorserve.sources.tuning import DEFAULTS
from tensorserve.wrapping.base import Services


def access_for(settings: SourceSettings) -> Access:
    """Endpoint, credentials, retries and limits for the sources."""
    return Access(
        s3=settings.s3,
        gcs=settings.gcs,
        azure=settings.azure,
        hub=settings.hub,
        policy=RetryPolicy(deadline=settings.fetch_deadline),
        allowed_hosts=frozenset(settings.allowed_hosts),
        connections=settings.fetch_connections or DEFAULTS.most_connections,
    )


def services_for(settings: SourceSettings) -> Services:
    """Addresses and credentials of key services."""
    return Services(
        vault=settings.vault,
        s3=settings.s3,
        azure=settings.azure,
        cdh_url=settings.cdh_url,
        policy=access_for(settings).policy,
    )


def key_for(settings: SourceSettings) -> ModelKey | None:
    """The key or passphrase that the user gave, if any; one by reference once it was unwrapped
    (config/unwrapping.py)."""
    if settings.key is None and settings.key_uri is not None:
        # Not to be taken for a start without a key, which serves plain weights.
        raise TensorserveError("The key was asked for before it was unwrapped.")
    if settings.key is not None:
        return GivenKey(settings.key.reveal(), settings.key.origin)
    if settings.passphrase is not None:
        return parse_passphrase(settings.passphrase)
    return None


def compiled_key_for(settings: SourceSettings, *, encrypted: bool) -> ModelKey | None:
    """The key of sealed compiled code (bundle/compiled.py) for a bundle that is `encrypted` or not.

    None for a plain bundle without a key of its own: anybody could write code for it.
    """
    if settings.compiled_key is not None:
        return GivenKey(settings.compiled_key.reveal(), settings.compiled_key.origin)
    return key_for(settings) if encrypted else None


def adapters_key_for(settings: Settings) -> ModelKey | None:
    """The key of adapters that are found while serving: one of their own, else the model's."""
    if settings.adapters_key is not None:
        return GivenKey(settings.adapters_key.reveal(), settings.adapters_key.origin)
    return key_for(settings)


def has_key(settings: SourceSettings) -> bool:
    """Whether the user gave a key, by value or by reference, or a passphrase: the weights must be
    sealed then."""
    given = (settings.key, settings.passphrase, settings.key_uri)
    return any(one is not None for one in given)
