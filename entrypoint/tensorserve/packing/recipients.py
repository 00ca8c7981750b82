"""For whom is the model's key wrapped: `pack --wrap`, `rewrap --add` and `--remove`?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorserve.bundle.wrapped_keys import MOST_RECIPIENTS, WrappedKeys
from tensorserve.errors import ConfigurationError, UsageError
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Provider, Services, WrappedKey, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping, name_of, parse_reference


def wrapped_for(
    providers: Iterable[Provider],
    key: Secret,
    salt: bytes,
    others: Sequence[WrappedKey] = (),
) -> WrappedKeys:
    """The model's `key` (32 bytes) wrapped by each of `providers`, beside those that there are.

    `salt` is that of the manifest's authentication. One of `others` for the same wrapping key is
    replaced: a key that the service has rotated is used in its latest version. Raises
    ConfigurationError for too many recipients, and the providers' errors.
    """
    fingerprint = fingerprint_of(key.reveal())
    binding = WrappedKeys(fingerprint, ()).binding(salt)
    recipients = {str(entry): entry for entry in others}
    for provider in providers:
        entry = WrappedKey(provider.kind, provider.key, provider.wrap(key, binding))
        recipients[str(entry)] = entry
    if len(recipients) > MOST_RECIPIENTS:
        raise ConfigurationError(
            f"{len(recipients)} recipients are more than a manifest has, {MOST_RECIPIENTS}.",
            hint="Wrap for one key that several may use, as Vault and KMS have them.",
        )
    return WrappedKeys(fingerprint, tuple(recipients.values()))


def without(
    recipients: Sequence[WrappedKey], names: Iterable[str], services: Services
) -> tuple[WrappedKey, ...]:
    """`recipients` without those that the user names. Raises UsageError for one that is none."""
    left = list(recipients)
    for name in names:
        reference = parse_reference(name, "--remove")
        key = name_of(reference)
        if reference.kind == "file" and key.startswith("/"):
            # The manifest names a wrapping key by its fingerprint; either may be given.
            key = for_wrapping(name, services).key
        gone = [entry for entry in left if (entry.provider, entry.key) == (reference.kind, key)]
        if not gone:
            raise UsageError(
                f"--remove {name}: the key is not wrapped for it.",
                hint=f"The recipients are: {', '.join(map(str, left)) or 'none'}.",
            )
        left = [entry for entry in left if entry not in gone]
    return tuple(left)
