"""How does compiled code that is sealed in the bundle get into the engine's caches?

It is fetched whole into a private directory, authenticated whole, unpacked beside the place where
it belongs, and gets its name there in one step. The engine's cache variables then point at it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tensorserve import sources
from tensorserve.bundle.compiled import MAX_SEALED_BYTES, SealedCache, name_of
from tensorserve.bundle.compiled_archive import unpack_files
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import Manifest
from tensorserve.config.access import access_for, compiled_key_for
from tensorserve.config.compile_caches import MOVED, cache_root, cache_variables
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.settings import Settings
from tensorserve.config.value_parsers import COMPILING
from tensorserve.crypto.ed25519 import VerifyingKey
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.launch.compile_fingerprint import factors_of, fingerprint_of
from tensorserve.launch.gpus import Gpus
from tensorserve.sources import ForbiddenError, NotFoundError, Source
from tensorserve.telemetry.compiled_keys import compiled_keys
from tensorserve.telemetry.names import ABSENT, BROUGHT, KEPT, NO_PLACE
from tensorserve.telemetry.schema import CompiledCacheKnown

OFF, REQUIRED = "off", "required"
_FOLDER = "tensorserve-compiled"
_RANGE_BYTES = 8 * 1024**2
_CONNECTIONS = 8


def compiled_root(environment: dict[str, str]) -> Path | None:
    """The folder below which sealed caches are unpacked; None where there is no place for them.

    It is the same in every start with `environment`: caches hold absolute paths.
    """
    root = cache_root(environment)
    if root is None and (home := environment.get("HOME", "")).startswith("/"):
        root = Path(home) / ".cache"  # XDG's default
    return None if root is None else root / _FOLDER


def with_caches(plan: LaunchPlan, place: Path) -> LaunchPlan:
    """The plan of an engine whose caches are below `place`."""
    moved = {name: value for name, value in cache_variables(place).items() if name in MOVED}
    environment = dict(plan.environment) | moved
    return replace(plan, environment=tuple(sorted(environment.items())))


def bring_compiled(
    settings: Settings,
    plan: LaunchPlan,
    manifest: Manifest | None,
    gpus: Gpus | None,
    tell: Callable[[CompiledCacheKnown], None],
    warn: Callable[[str], None],
) -> LaunchPlan:
    """The plan of an engine that takes the bundle's compiled code for it, if there is some.

    `plan` is final but for that: flags and environment are in the fingerprint. `tell` gets the
    event. Raises CorruptError (65) for a cache that is not authentic; with TENSORSERVE_COMPILED=
    required ConfigurationError (78) where there is none; and the sources' errors.
    """
    if settings.compiled == OFF:
        return plan
    demanded = settings.compiled in {REQUIRED, COMPILING}
    root = compiled_root(dict(plan.environment))
    try:
        manifest, key = sealed_for(settings, manifest)
        if root is None:
            raise ConfigurationError(
                "There is no place for compiled code: neither XDG_CACHE_HOME nor HOME is an "
                "absolute path.",
                hint="Set XDG_CACHE_HOME.",
            )
    except ConfigurationError:
        if demanded:
            raise
        return plan
    fingerprint = fingerprint_of(factors_of(plan, manifest, gpus, root))
    place = root / fingerprint[:32]
    try:
        # Who owns the folder could exchange what is in it.
        _is_there(root)
        if settings.compiled == COMPILING:
            _make_empty(place)
            result = COMPILING
        elif _is_there(place):
            result = KEPT
        else:
            result = _bring(settings, plan.bundle_uri, key, fingerprint, place)
    except (NotFoundError, ForbiddenError) as error:
        # Servers may answer 403 for a file that is missing (sources/base.py).
        if not demanded:
            tell(CompiledCacheKnown(ABSENT, fingerprint))
            return plan
        if isinstance(error, ForbiddenError):
            raise
        raise ConfigurationError(
            "TENSORSERVE_COMPILED=required, and the bundle has no compiled code for this engine: "
            f"{name_of(fingerprint)} is missing.",
            hint="Run `tensorserve precompile URI` with the settings, the image and the kind of "
            "machine of this server.",
        ) from error
    except (ConfigurationError, OSError) as error:
        # The place is at fault, not the file: without a cache the engine compiles.
        problem = _explained(place, error)
        if demanded:
            raise problem from error
        warn(f"the bundle's compiled code is not used: {problem}")
        tell(CompiledCacheKnown(NO_PLACE, fingerprint))
        return plan
    plan = with_caches(plan, place)
    folder = dict(plan.environment)["VLLM_CACHE_ROOT"]
    tell(CompiledCacheKnown(result, fingerprint, folder, len(compiled_keys(Path(folder)))))
    return plan


def sealed_for(settings: Settings, manifest: Manifest | None) -> tuple[Manifest, ModelKey]:
    """The manifest that compiled code is bound to, and the key that seals it.

    Raises ConfigurationError where nothing could authenticate it.
    """
    encrypted = manifest is not None and manifest.encryption is not None
    if manifest is None or (encrypted and manifest.authenticated_by is None):
        raise ConfigurationError(
            "The bundle has no authenticated manifest.json, which compiled code belongs to.",
            hint="Add one: `tensorserve sign URI`, with the key. Then `tensorserve precompile`.",
        )
    key = compiled_key_for(settings, encrypted=encrypted)
    if key is None:
        raise ConfigurationError(
            "The bundle is not encrypted: without a key, anybody who can write to it could plant "
            "compiled code that servers run.",
            hint="Make a key for it (`openssl rand -hex 32`), and give it to `tensorserve "
            "precompile` and to the servers as TENSORSERVE_COMPILED_KEY_FILE.",
        )
    return manifest, key


def _bring(
    settings: Settings, bundle_uri: str, key: ModelKey, fingerprint: str, place: Path
) -> str:
    """Fetch, authenticate and unpack; BROUGHT or KEPT. Raises what bring_compiled explains."""
    signer = settings.compiled_signature_key
    verifying_key = None if signer is None else VerifyingKey.parse(signer)
    uri = sources.join(bundle_uri, name_of(fingerprint))
    source = sources.open_source(uri, access_for(settings))
    try:
        with _staging(place.parent) as staging:
            with _fetch(source, staging).open("rb") as file:
                cache = SealedCache.authenticate(
                    file,
                    source.size,
                    source.name,
                    fingerprint=fingerprint,
                    key=key,
                    verifying_key=verifying_key,
                )
                _refuse_small(staging, cache.contents.files_bytes)
                unpacked = staging / "files"
                unpacked.mkdir(mode=0o700)
                unpack_files(cache.chunks(), cache.contents, unpacked, source.name)
            return _publish(unpacked, place)
    finally:
        source.close()


def _make_empty(place: Path) -> None:
    """A new directory `place`, for `tensorserve precompile`."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        raise ConfigurationError(
            f"{place} is there: a server on this machine uses it, or an earlier job left it.",
            hint="Run the job with an XDG_CACHE_HOME of the same path that is empty (in a new "
            "container, without the servers' volume), or remove the directory.",
        ) from None


def _explained(place: Path, error: ConfigurationError | OSError) -> ConfigurationError:
    if isinstance(error, ConfigurationError):
        return error
    return ConfigurationError(
        f"{place} cannot be written: {error.strerror}.",
        hint="Set XDG_CACHE_HOME to a writable directory, or TENSORSERVE_COMPILED=off.",
    )


def _is_there(place: Path) -> bool:
    """Whether `place` exists. Raises ConfigurationError if it is no directory of this user."""
    try:
        info = place.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise ConfigurationError(
            f"{place} is no directory, or belongs to another user.",
            hint="Remove it, or set XDG_CACHE_HOME to a directory of this server alone.",
        )
    return True


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A private directory on the disk of `root`, removed afterwards."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = root / f".{secrets.token_hex(8)}.partial"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _fetch(source: Source, directory: Path) -> Path:
    """The whole file, still sealed, by several connections. Raises CorruptError if too large."""
    if source.size > MAX_SEALED_BYTES:
        raise CorruptError(
            f"{source.name} is {source.size} bytes; sealed compiled code has at most "
            f"{MAX_SEALED_BYTES}.",
            hint="Delete it, and run `tensorserve precompile` again.",
        )
    _refuse_small(directory, source.size)
    path = directory / "sealed"
    with path.open("xb") as file:

        def fetch(offset: int) -> None:
            data = memoryview(source.read(offset, min(_RANGE_BYTES, source.size - offset)))
            while data:
                written = os.pwrite(file.fileno(), data, offset)
                data, offset = data[written:], offset + written

        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="tensorserve-compiled") as pool:
            for _ in pool.map(fetch, range(0, source.size, _RANGE_BYTES)):
                pass
    return path


def _refuse_small(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigurationError(
            f"{directory.parent} has {free} bytes free, compiled code needs {needed}.",
            hint="Give the cache's volume more room, or set TENSORSERVE_COMPILED=off.",
        )


def _publish(unpacked: Path, place: Path) -> str:
    """Give the unpacked files their name in one step; what another start has put there stays."""
    try:
        unpacked.rename(place)
    except OSError:
        # Not empty: rename replaces no files.
        if not _is_there(place):
            raise
        return KEPT
    return BROUGHT
