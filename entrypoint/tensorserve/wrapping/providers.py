"""Which kinds of wrapping keys are there, and which module has each?

A new kind is one module of this package and one line in KINDS. The module has `to_wrap` and
`to_unwrap`, which make a Provider of a Reference. It imports its client on first use, so that a
start without it needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tensorserve.errors import ConfigurationError
from tensorserve.wrapping.base import Provider, Reference, Services, WrappedKey


@dataclass(frozen=True)
class Kind:
    """How one kind of wrapping key is named and found."""

    module: str
    """The module of this package."""
    wraps: str | None
    """An example for `--wrap`; None: it only unwraps."""
    unwraps: str
    """An example for TENSORSERVE_KEY_URI."""
    from_manifest: bool = False
    """Whether a start may use it without TENSORSERVE_KEY_URI. The module then has
    `is_configured`."""


KINDS = {
    "file": Kind("file", "file:/run/secrets/wrapping-key", "file:/run/secrets/wrapping-key"),
    "age": Kind("age", "age:age1…", "age:/run/secrets/age-identity"),
    "vault": Kind("vault", "vault:transit/models", "vault:transit/models", from_manifest=True),
    "awskms": Kind("awskms", "awskms:alias/models", "awskms:alias/models", from_manifest=True),
    "gcpkms": Kind("gcpkms", "gcpkms:projects/…/cryptoKeys/K", "gcpkms:projects/…/cryptoKeys/K"),
    "azurekeyvault": Kind(
        "azurekeyvault", "azurekeyvault://my-vault/models", "azurekeyvault://my-vault/models"
    ),
    "kbs": Kind("kbs", None, "kbs:///default/wrapping-key/models"),
}
EXAMPLES = ", ".join(kind.unwraps for kind in KINDS.values())
"""One of each kind, for messages."""


def parse_reference(text: str, name: str) -> Reference:
    """A reference of a known kind. Raises ConfigurationError, which names `name`."""
    reference = Reference.parse(text, name)
    if reference.kind not in KINDS:
        raise ConfigurationError(
            f"{name}: {reference.kind!r} is not a kind of wrapping key.", hint=f"Use {EXAMPLES}."
        )
    return reference


def for_wrapping(text: str, services: Services) -> Provider:
    """The provider of `--wrap text`. Raises ConfigurationError and the provider's errors."""
    reference = parse_reference(text, "--wrap")
    made: Provider = _module(reference.kind).to_wrap(reference, services)
    return made


def for_unwrapping(reference: Reference, services: Services) -> Provider:
    """The provider of TENSORSERVE_KEY_URI. Raises ConfigurationError and the provider's errors."""
    made: Provider = _module(reference.kind).to_unwrap(reference, services)
    return made


def named_by_manifest(entry: WrappedKey, services: Services) -> Provider | None:
    """The provider of an entry, where nothing else names one; None where it is not set up here.

    Address and credentials come from `services` alone. Of the entry, only kind and key are taken.
    """
    kind = KINDS.get(entry.provider)
    if (
        kind is None
        or not kind.from_manifest
        or not _module(entry.provider).is_configured(services)
    ):
        return None
    return for_unwrapping(Reference(entry.provider, None, ""), services)


def name_of(reference: Reference) -> str:
    """What a manifest calls the key of `reference`, of a kind that opens no file for it."""
    module = _module(reference.kind)
    name: str = module.name_of(reference) if hasattr(module, "name_of") else reference.key
    return name


def shown(reference: Reference, services: Services) -> str:
    """What would be asked, for `plan`: no file is read and no service asked."""
    module = _module(reference.kind)
    place = getattr(module, "place", None)
    return f"{reference}" if place is None else f"{reference} ({place(reference, services)})"


def _module(kind: str) -> Any:
    return import_module(f"{__package__}.{KINDS[kind].module}")
