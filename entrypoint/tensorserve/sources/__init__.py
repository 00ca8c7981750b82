"""How are byte ranges of files and of objects behind a network read, behind one interface?"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from tensorserve.sources.base import (
    Access,
    AzureAccess,
    FetchObserver,
    ForbiddenError,
    GcsAccess,
    HubAccess,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    S3Access,
    Source,
)
from tensorserve.sources.scatter_read import Filling
from tensorserve.sources.schemes import module_of, scheme_of
from tensorserve.sources.ssrf_guard import host_and_port

__all__ = [
    "Access",
    "AzureAccess",
    "FetchObserver",
    "Filling",
    "ForbiddenError",
    "GcsAccess",
    "HubAccess",
    "NotFoundError",
    "ReplacedError",
    "RetryPolicy",
    "S3Access",
    "Source",
    "is_remote",
    "join",
    "list_names",
    "local_path",
    "open_source",
]


def open_source(uri: str, access: Access, observer: FetchObserver | None = None) -> Source:
    """Opens `uri` for reading: a path, or a URI of schemes.py.

    The source's size and version are known afterwards. Raises NotFoundError (exit code 65) for a
    missing object, SourceUnavailableError (69), PermissionDeniedError (77) or ConfigurationError
    (78).
    """
    source: Source = module_of(uri).open_object(uri, access, observer)
    return source


def list_names(uri: str, access: Access) -> dict[str, int] | None:
    """{relative name: size in bytes} of all files below the directory `uri`; None for HTTP(S).

    Raises the sources' errors.
    """
    names: dict[str, int] | None = module_of(uri).list_objects(uri, access)
    return names


def is_remote(uri: str) -> bool:
    """Whether `uri` is behind a network. Raises ConfigurationError for an unknown scheme."""
    return scheme_of(uri).remote


def local_path(uri: str) -> Path:
    """The path of `uri` (a path, or file:///…). Raises ConfigurationError for another host."""
    from tensorserve.sources.local import local_path as path_of

    return path_of(uri)


def join(base: str, name: str) -> str:
    """The URI of file `name` below the directory `base`.

    `name` is not encoded; it is percent-encoded for http(s):// and file:// URIs. The query of an
    HTTP URI (a SAS token) is kept.
    """
    if base.startswith("file://"):
        return f"file://{base.removeprefix('file://').rstrip('/')}/{quote(name)}"
    if not scheme_of(base).has_query:
        return f"{base.rstrip('/')}/{name}"
    host_and_port(base, "The bundle's address")
    parts = urlsplit(base)
    path = f"{parts.path.rstrip('/')}/{quote(name, safe='/-_.~')}"
    return urlunsplit(parts._replace(path=path))
