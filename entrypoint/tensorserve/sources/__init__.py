"""Sources: one small interface over files, HTTP(S) and S3, with one retry policy."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

from tensorserve.errors import ConfigurationError
from tensorserve.sources.addresses import host_and_port
from tensorserve.sources.base import (
    Access,
    FetchObserver,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    S3Access,
    Source,
)

__all__ = [
    "Access",
    "FetchObserver",
    "NotFoundError",
    "ReplacedError",
    "RetryPolicy",
    "S3Access",
    "Source",
    "join",
    "list_names",
    "open_source",
]


def open_source(uri: str, access: Access, observer: FetchObserver | None = None) -> Source:
    """Open `uri` for reading: a path, file://, http(s):// or s3://.

    Size and version are known afterwards. Raises NotFoundError (65) for a missing object,
    SourceUnavailableError (69), PermissionDeniedError (77) or ConfigurationError (78).
    """
    kind = _kind(uri)
    # Imported where needed: a local bundle pays neither for urllib3 nor for botocore.
    if kind == "s3":
        from tensorserve.sources.s3 import open_s3

        return open_s3(uri, access, observer)
    if kind == "http":
        from tensorserve.sources.http import HttpSource

        return HttpSource(uri, access, observer)
    from tensorserve.sources.local import LocalSource, local_path

    return LocalSource(local_path(uri), observer)


def list_names(uri: str, access: Access) -> dict[str, int] | None:
    """{relative name: bytes} of all below the directory `uri`; None where HTTP cannot say."""
    kind = _kind(uri)
    if kind == "s3":
        from tensorserve.sources.s3 import list_s3

        return list_s3(uri, access)
    if kind == "http":
        return None
    from tensorserve.sources.local import list_directory, local_path

    return list_directory(local_path(uri))


def join(base: str, name: str) -> str:
    """The URI of `name`, as it is on a disk, below the directory `base`.

    It is encoded where URIs are: in an HTTP one, whose query (a SAS token) is kept, and in file://.
    """
    if base.startswith("file://"):
        return f"file://{base.removeprefix('file://').rstrip('/')}/{quote(name)}"
    if _kind(base) != "http":
        return f"{base.rstrip('/')}/{name}"
    host_and_port(base, "The bundle's address")
    parts = urlsplit(base)
    path = f"{parts.path.rstrip('/')}/{quote(name, safe='/-_.~')}"
    return urlunsplit(parts._replace(path=path))


def _kind(uri: str) -> str:
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    if scheme in {"http", "https"}:
        return "http"
    if scheme in {"s3", "file"}:
        return scheme
    # Only the scheme is shown: what follows may hold a password, whatever "htps" is.
    raise ConfigurationError(
        f"The scheme {scheme!r} of a URI is not supported.",
        hint="Use a path, file://, http://, https:// or s3://bucket/prefix.",
    )
