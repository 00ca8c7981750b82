"""Which repository, revision and file does an hf:// URI name?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri

_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
# A branch, a tag or a commit; a "/" in it is written %2F, as in the hub's own URLs.
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9_](?:[A-Za-z0-9._%-]{0,198}[A-Za-z0-9_])?")
MAIN = "main"


@dataclass(frozen=True)
class Place:
    """A file, or a directory, of a model's repository."""

    repository: str
    """organisation/model"""
    revision: str
    path: str


def split_hf(uri: str) -> Place:
    """The parts of hf://organisation/model[@revision][/path]. Raises ConfigurationError."""
    organisation, _, rest = uri.removeprefix("hf://").partition("/")
    name, _, path = rest.partition("/")
    model, at, revision = name.partition("@")
    proper = _PART.fullmatch(organisation) and _PART.fullmatch(model)
    if not proper or (at and not _REVISION.fullmatch(revision)):
        raise ConfigurationError(
            f"{redact_uri(uri)}: that does not name a model of the hub.",
            hint="Use hf://organisation/model, or hf://organisation/model@revision/directory; a / "
            "in a revision is written %2F. The token goes into HF_TOKEN.",
        )
    return Place(f"{organisation}/{model}", unquote(revision) or MAIN, path)
