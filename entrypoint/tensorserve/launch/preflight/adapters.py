"""Can the store of adapters be read, and do they open? For `tensorserve check`.

Not for a start: adapters may come later, and a model whose store is away is served without them.
"""

from __future__ import annotations

from tensorserve import sources
from tensorserve.bundle.adapter_identity import ADAPTER_NAME
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.config.access import access_for
from tensorserve.config.settings import Settings
from tensorserve.config.signature import trust_for
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.launch.adapter_store import find_adapter
from tensorserve.launch.preflight.results import Passed
from tensorserve.secret import redact_uri
from tensorserve.sources import NotFoundError
from tensorserve.telemetry import Check

_MOST_NAMED = 5
_MOST_READ = 64


def check_adapters(settings: Settings) -> tuple[Passed, tuple[str, ...]] | None:
    """What is at TENSORSERVE_ADAPTERS_URI, and a warning for each adapter that would be refused.

    None without the variable. Only manifests are read, of at most 64 adapters. Raises
    ConfigurationError for a store that is not there, and the sources' errors.
    """
    if settings.adapters_uri is None:
        return None
    place = redact_uri(settings.adapters_uri)
    names, listed = _names(settings, settings.adapters_uri)
    access, trust = access_for(settings), trust_for(settings)
    warnings = []
    for name in names[:_MOST_READ]:
        try:
            find_adapter(settings, name, access, trust)
        except (CorruptError, ConfigurationError) as error:
            warnings.append(f"adapter {name} would be refused: {error}")
    if not listed and not names:
        return Passed(Check.ADAPTERS, f"at {place}, which cannot list them"), ()
    named = ", ".join(names[:_MOST_NAMED]) + (" …" if len(names) > _MOST_NAMED else "")
    good = len(names) - len(warnings)
    text = f"{good} of {len(names)} at {place}{named and f': {named}'}"
    return Passed(Check.ADAPTERS, text), tuple(warnings)


def _names(settings: Settings, uri: str) -> tuple[list[str], bool]:
    """The adapters in the store, and whether it could list them; else those that are allowed."""
    try:
        listing = sources.list_names(uri, access_for(settings))
    except NotFoundError as error:
        raise ConfigurationError(
            f"TENSORSERVE_ADAPTERS_URI={redact_uri(uri)}: {error.message}",
            hint="Make it, or pack the first adapter there: `tensorserve pack-adapter`.",
        ) from error
    if listing is None:
        return [name for name in settings.adapters_allow if "*" not in name], False
    folders = (name.rpartition("/") for name in listing)
    return sorted(
        folder for folder, _, file in folders if file == MANIFEST and ADAPTER_NAME.fullmatch(folder)
    ), True
