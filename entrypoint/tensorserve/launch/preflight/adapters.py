"""Can the store of adapters be read, and what is in it? For `tensorserve check`.

Not for a start: adapters may come later, and a model whose store is away is served without them.
"""

from __future__ import annotations

from tensorserve import sources
from tensorserve.bundle.adapter_identity import ADAPTER_NAME
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.config.access import access_for
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight.results import Passed
from tensorserve.secret import redact_uri
from tensorserve.sources import NotFoundError
from tensorserve.telemetry import Check

_MOST_NAMED = 5


def check_adapters(settings: Settings) -> Passed | None:
    """What is at TENSORSERVE_ADAPTERS_URI; None without one.

    Raises ConfigurationError for a store that is not there, and the sources' errors.
    """
    uri = settings.adapters_uri
    if uri is None:
        return None
    place = redact_uri(uri)
    try:
        listing = sources.list_names(uri, access_for(settings))
    except NotFoundError as error:
        raise ConfigurationError(
            f"TENSORSERVE_ADAPTERS_URI={place}: {error.message}",
            hint="Make it, or pack the first adapter there: `tensorserve pack-adapter`.",
        ) from error
    if listing is None:
        return Passed(Check.ADAPTERS, f"at {place}, which cannot list them")
    folders = sorted(
        folder
        for folder, _, file in (name.rpartition("/") for name in listing)
        if file == MANIFEST and ADAPTER_NAME.fullmatch(folder)
    )
    named = ", ".join(folders[:_MOST_NAMED]) + (" …" if len(folders) > _MOST_NAMED else "")
    return Passed(Check.ADAPTERS, f"{len(folders)} at {place}{named and f': {named}'}")
