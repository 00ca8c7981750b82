"""Which error and hint does a refusal of a Hugging Face hub become, from its X-Error-Code?

The codes are those that huggingface_hub tells apart (huggingface_hub/utils/_http.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.sources.base import ForbiddenError, NotFoundError
from tensorserve.sources.hub_uri import Place


@dataclass(frozen=True)
class Asked:
    """The request that was refused."""

    name: str
    """The URI, for messages."""
    place: Place
    has_token: bool

    def explain(self, status: int, headers: Mapping[str, str], _body: bytes) -> Exception | None:
        """The error for a refusal; None if its HTTP status suffices."""
        code = headers.get("X-Error-Code") or headers.get("x-error-code") or ""
        rule = _RULES.get(code) or (_BY_STATUS.get(status) if 400 <= status < 500 else None)
        return rule(self) if rule is not None else None


def _no_file(asked: Asked) -> Exception:
    return NotFoundError(
        f"{asked.name} does not exist at revision {asked.place.revision!r}.",
        hint="Check the path after hf://organisation/model.",
    )


def _no_repository(asked: Asked) -> Exception:
    what = f"{asked.place.repository!r} does not exist on the hub"
    if asked.has_token:
        return SourceUnavailableError(
            f"{what}, or the token in HF_TOKEN may not see it.",
            hint="Check the name, and that the token may read this repository.",
        )
    return PermissionDeniedError(
        f"{what}, or is private.", hint="Check the name; for a private model, set HF_TOKEN."
    )


def _no_revision(asked: Asked) -> Exception:
    return ConfigurationError(
        f"{asked.place.repository} has no revision {asked.place.revision!r}.",
        hint="Give a branch, a tag or a commit: hf://organisation/model@revision.",
    )


def _gated(asked: Asked) -> Exception:
    return ForbiddenError(
        f"{asked.place.repository} is gated: its conditions have not been accepted.",
        hint="Accept them on the model's page with the account of HF_TOKEN.",
    )


def _denied(asked: Asked) -> Exception:
    if asked.has_token:
        return ForbiddenError(
            f"{asked.name}: the hub does not let the token in HF_TOKEN read it.",
            hint="Check that the token is valid, and may read this repository.",
        )
    return _no_repository(asked)


_Rule = Callable[[Asked], Exception]
_RULES: dict[str, _Rule] = {
    "EntryNotFound": _no_file,
    "RepoNotFound": _no_repository,
    "RevisionNotFound": _no_revision,
    "GatedRepo": _gated,
}
_BY_STATUS: dict[int, _Rule] = {401: _denied, 403: _denied}
