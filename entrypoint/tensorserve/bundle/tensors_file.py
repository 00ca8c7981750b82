"""How is a bundle's .tensors file opened: manifest read, index parsed, key checked?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensorserve import sources
from tensorserve.bundle.key_check import prove_key
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import MANIFEST, Manifest, read_manifest
from tensorserve.bundle.manifest_mac import UnknownMacError
from tensorserve.errors import CorruptError, WrongKeyError
from tensorserve.format import FileIndex, FileKey, read_index
from tensorserve.sources import (
    Access,
    FetchObserver,
    ForbiddenError,
    NotFoundError,
    ReplacedError,
    Source,
)


@dataclass(frozen=True)
class OpenTensors:
    """One open .tensors file with its parsed index and the key that was checked on it."""

    source: Source
    index: FileIndex
    key: FileKey | None


def open_manifest(
    bundle_uri: str,
    access: Access,
    key: ModelKey | None,
    tensors: Iterable[str],
    *,
    pin: str | None = None,
    wish: str = "auto",
) -> Manifest | None:
    """As read_manifest, but a MAC that does not fit is told from a wrong key where possible.

    `tensors` are names of the bundle's .tensors files that may exist: the first existing one shows
    whether the key is right. `wish` is TENSORSERVE_VERIFY. An answer of 403 counts as no manifest
    without a key, or if `wish` is `hashes` or `tags`; else ForbiddenError is raised. Raises
    WrongKeyError, and read_manifest's errors.
    """
    hidden = key is None or wish in {"hashes", "tags"}
    try:
        return read_manifest(bundle_uri, access, key, pin=pin, may_be_hidden=hidden)
    except UnknownMacError as error:
        for name in tensors:
            try:
                open_tensors(sources.join(bundle_uri, name), access, key).source.close()
            except (NotFoundError, ForbiddenError):
                continue
            except WrongKeyError as wrong:
                raise wrong from error
            except CorruptError:
                break  # this file is damaged as well, so that it cannot tell the two cases apart
            raise CorruptError(
                f"The key opens {name}, but the MAC of {MANIFEST} is not this key's: somebody "
                "without the key changed the manifest, or it is another bundle's.",
                hint="Copy the whole bundle again from where it was packed, and check who can "
                "write to this storage.",
            ) from error
        raise


def open_tensors(
    uri: str,
    access: Access,
    key: FileKey | None,
    *,
    observer: FetchObserver | None = None,
    version: str | None = None,
) -> OpenTensors:
    """Opens `uri`, reads its index and checks `key` with one encrypted chunk (key_check.py).

    `version` is the source's version of a file that was checked before: ReplacedError (a
    CorruptError) if the file has another one now. `observer` counts requests and retries. Raises
    the sources', the format's and the key's errors.
    """
    source = _open_version(uri, access, observer, version)
    try:
        return _read(source, key)
    except CorruptError as error:
        source.close()
        # A second read tells damage in transit from damage in storage. A wrong key needs none.
        if not source.remote or isinstance(error, WrongKeyError):
            raise
        if observer is not None:
            observer.retry("corrupt")
        # The same version again: a replaced object may be another model.
        source = _open_version(uri, access, observer, source.version)
        return _read(source, key)
    except BaseException:
        source.close()
        raise


def _read(source: Source, key: FileKey | None) -> OpenTensors:
    index = read_index(source)
    prove_key(source, index, key)
    return OpenTensors(source, index, key)


def _open_version(
    uri: str, access: Access, observer: FetchObserver | None, version: str | None
) -> Source:
    source = sources.open_source(uri, access, observer)
    if version is not None and source.version != version:
        source.close()
        raise ReplacedError(
            f"{source.name} was replaced since this start checked it.",
            hint="Start again; upload models under a new name instead of over an old one.",
        )
    return source
