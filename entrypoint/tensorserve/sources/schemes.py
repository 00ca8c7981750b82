"""Which schemes can a model URI have, and who checks, opens and lists each?

A new scheme is one module of this package and one line in SCHEMES. The module has `open_object`
and `list_objects`; it is imported on first use, so that a local bundle needs neither urllib3 nor a
cloud's library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tensorserve.errors import ConfigurationError
from tensorserve.sources.azure_uri import split_az
from tensorserve.sources.gcs_uri import split_gs
from tensorserve.sources.hub_uri import split_hf
from tensorserve.sources.s3_uri import split_s3
from tensorserve.sources.ssrf_guard import host_and_port


@dataclass(frozen=True)
class Scheme:
    """How URIs of one scheme are treated."""

    example: str
    """For messages."""
    module: str
    """The module of this package."""
    check: Callable[[str], object]
    """Raises ConfigurationError for a URI that cannot be one of this scheme."""
    encoded: bool = False
    """Whether a name is percent-encoded in the URI; elsewhere "?", "#" and "%" are its own."""
    has_query: bool = False
    remote: bool = True


def _any(_: str) -> None: ...


def _url(uri: str) -> None:
    host_and_port(uri, "The model's address")


SCHEMES = {
    "file": Scheme("a path, file://", "local", _any, encoded=True, remote=False),
    "http": Scheme("http://", "http", _url, encoded=True, has_query=True),
    "https": Scheme("https://", "http", _url, encoded=True, has_query=True),
    "s3": Scheme("s3://bucket/prefix", "s3", split_s3),
    "gs": Scheme("gs://bucket/prefix", "gcs", split_gs),
    "az": Scheme("az://container/prefix", "azure", split_az),
    "hf": Scheme("hf://organisation/model", "hub", split_hf),
}
_EXAMPLES = [scheme.example for scheme in SCHEMES.values()]
EXAMPLES = f"{', '.join(_EXAMPLES[:-1])} or {_EXAMPLES[-1]}"
"""All schemes, for messages."""


def scheme_of(uri: str) -> Scheme:
    """The scheme of `uri`; a text without one is a path. Raises ConfigurationError."""
    name = uri.partition("://")[0] if "://" in uri else "file"
    if name not in SCHEMES:
        # Only the scheme is shown: the rest may contain a password, even if it is mistyped.
        raise ConfigurationError(
            f"The scheme {name!r} of a URI is not supported.", hint=f"Use {EXAMPLES}."
        )
    return SCHEMES[name]


def module_of(uri: str) -> Any:
    """The module that opens and lists `uri`. Raises ConfigurationError."""
    return import_module(f"{__package__}.{scheme_of(uri).module}")
