"""Which of a manifest's wrapped keys is unwrapped, and by which provider?

With TENSORSERVE_KEY_URI, those that its provider can open, in the manifest's order. Without it,
those whose service is set up in the environment, in the same order. The first key that comes out
and has the manifest's fingerprint is taken. The manifest is not believed until its MAC fits that
key (bundle/manifest.py).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tensorserve.errors import (
    ConfigurationError,
    SourceUnavailableError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.secret import Secret
from tensorserve.wrapping.base import (
    KEY_BYTES,
    Binding,
    Provider,
    Reference,
    Services,
    WrappedKey,
    fingerprint_of,
    foreign,
)
from tensorserve.wrapping.providers import for_unwrapping, named_by_manifest


@dataclass(frozen=True)
class Unwrapped:
    """The model's key, and where it came from."""

    key: Secret
    """32 bytes; the origin names the provider."""
    by: str
    """The provider, for messages."""
    proves_sender: bool
    """As Provider.proves_sender."""


def unwrap_key(
    entries: Sequence[WrappedKey],
    binding: Binding,
    reference: Reference | None,
    services: Services,
    name: str,
) -> Unwrapped:
    """The model's key from `entries`, the wrapped keys of the manifest called `name`.

    Raises WrongKeyError where `reference` is none of the recipients, ConfigurationError where there
    is no reference and no recipient's service is set up, and the first provider's error where
    several refuse.
    """
    failures: list[TensorserveError] = []
    tried: list[str] = []
    # A manifest with many recipients must not multiply the deadline.
    away: set[str] = set()
    for entry, provider in _candidates(entries, reference, services):
        if provider.kind in away:
            continue
        tried.append(str(entry))
        try:
            key = provider.unwrap(entry, binding)
        except TensorserveError as error:
            failures.append(error)
            if isinstance(error, SourceUnavailableError):
                away.add(provider.kind)
            continue
        by = provider.describe(entry.key)
        if len(key) != KEY_BYTES or not hmac.compare_digest(fingerprint_of(key), binding.key):
            failures.append(foreign(by))
            continue
        return Unwrapped(Secret(key, by), by, provider.proves_sender)
    if failures:
        if len(failures) > 1:
            failures[0].add_note(f"Tried in this order: {', '.join(tried)}.")
        raise failures[0]
    raise _none_fits(entries, reference, name)


def _candidates(
    entries: Sequence[WrappedKey], reference: Reference | None, services: Services
) -> Iterator[tuple[WrappedKey, Provider]]:
    if reference is not None:
        provider = for_unwrapping(reference, services)
        yield from ((entry, provider) for entry in entries if provider.opens(entry))
        return
    for entry in entries:
        found = named_by_manifest(entry, services)
        if found is not None:
            yield entry, found


def _none_fits(
    entries: Sequence[WrappedKey], reference: Reference | None, name: str
) -> TensorserveError:
    recipients = ", ".join(map(str, entries))
    if reference is not None:
        return WrongKeyError(
            f"The model's key is not wrapped for {reference}; the recipients in {name} are "
            f"{recipients}.",
            hint="Use one of these, or have somebody with the key add yours: "
            "`tensorserve rewrap URI --add …`.",
        )
    return ConfigurationError(
        f"The model's key is wrapped in {name} for {recipients}, and none of these can be asked "
        "with what is set here.",
        hint="Set TENSORSERVE_KEY_URI, and the service's credentials (docs/keys.md); or give the "
        "key itself, TENSORSERVE_KEY_FILE.",
    )
