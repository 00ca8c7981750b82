"""How a model's weights are opened: settings → access, key, and a parsed, proven .tensors file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensorserve import sources
from tensorserve.authentication import UnknownMacError
from tensorserve.errors import CorruptError, WrongKeyError
from tensorserve.format import FileIndex, FileKey, read_index
from tensorserve.keys import ModelKey, parse_key, parse_passphrase, prove_key
from tensorserve.manifest import MANIFEST, Manifest, read_manifest
from tensorserve.settings import Settings
from tensorserve.sources import (
    Access,
    FetchObserver,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    S3Access,
    Source,
)
from tensorserve.sources.base import MOST_CONNECTIONS


@dataclass(frozen=True)
class OpenTensors:
    """One .tensors file, open, its index read, its key proven."""

    source: Source
    index: FileIndex
    key: FileKey | None


def access_for(settings: Settings) -> Access:
    """How the sources reach what `settings` name."""
    s3 = settings.s3
    return Access(
        s3=S3Access(
            endpoint_url=s3.endpoint_url,
            region=s3.region,
            ca_bundle=s3.ca_bundle,
            access_key_id=s3.access_key_id,
            secret_access_key=s3.secret_access_key,
            session_token=s3.session_token,
        ),
        policy=RetryPolicy(deadline=settings.fetch_deadline),
        allowed_hosts=frozenset(settings.allowed_hosts),
        connections=settings.fetch_connections or MOST_CONNECTIONS,
    )


def key_for(settings: Settings) -> ModelKey | None:
    """The key or passphrase that the user gave, if any."""
    if settings.key is not None:
        return parse_key(settings.key)
    if settings.passphrase is not None:
        return parse_passphrase(settings.passphrase)
    return None


def has_key(settings: Settings) -> bool:
    """Whether the user gave a key or a passphrase: the weights must be sealed then."""
    return settings.key is not None or settings.passphrase is not None


def open_manifest(
    bundle_uri: str,
    access: Access,
    key: ModelKey | None,
    tensors: Iterable[str],
    *,
    pin: str | None = None,
) -> Manifest | None:
    """As read_manifest; a MAC that does not fit is told from a wrong key where that is possible.

    `tensors` are the bundle's files that may be there: the first one says whether it is the key.
    """
    try:
        return read_manifest(bundle_uri, access, key, pin=pin)
    except UnknownMacError as error:
        for name in tensors:
            try:
                open_tensors(sources.join(bundle_uri, name), access, key).source.close()
            except NotFoundError:
                continue
            except WrongKeyError as wrong:
                raise wrong from error
            except CorruptError:
                break  # damaged as well: nothing can be told apart
            raise CorruptError(
                f"The key opens {name}, but the MAC of {MANIFEST} is not this key's: somebody "
                "without the key changed the manifest, or it is another bundle's.",
                hint="Copy the whole bundle again from where it was packed, and look who can "
                "write here.",
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
    """Open `uri`, read its index and prove `key` on its first encrypted chunk.

    With `version`, the file must still be the one that carried it (it was checked before): a
    replaced file is a CorruptError. Raises the sources', the format's and the key's errors.
    """
    source = _open_version(uri, access, observer, version)
    try:
        return _read(source, key)
    except CorruptError as error:
        source.close()
        # Damaged on the wire, or at rest? What comes a second time is believed; a wrong key stays.
        if not source.remote or isinstance(error, WrongKeyError):
            raise
        if observer is not None:
            observer.retry("corrupt")
        # The same object: another one is another model.
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
