"""How does one adapter of the store get into memory, authenticated and checked against the model?

Everything here waits for the store, and runs in a thread of its own (engine/adapters/threads.py).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorserve import sources
from tensorserve.bounded_json import read_json
from tensorserve.bundle.adapter_fit import BaseModel, misfit
from tensorserve.bundle.adapters import (
    CONFIG,
    MOST_CONFIG_BYTES,
    SAFETENSORS,
    WEIGHTS,
    rank_of,
    unserved,
)
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.stand_ins import shapes_in
from tensorserve.config.access import adapters_key_for
from tensorserve.config.settings import Settings
from tensorserve.config.signature import trust_for, with_digests
from tensorserve.engine.adapters.refusal import (
    UNUSABLE,
    AdapterRefused,
    refused,
)
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.launch import handoff
from tensorserve.launch.adapter_store import Found, find_adapter, store_access
from tensorserve.launch.held_weights import Holder


@dataclass(frozen=True)
class Held:
    """An adapter in this process's memory."""

    name: str
    version: str
    size: int
    directory: Path
    """Where vLLM finds it. No other version of an adapter has ever had the same: vLLM's prefix
    cache takes what was computed with the same name and path for equal."""
    reference: str
    """Of its memory (launch/handoff.py)."""

    def release(self) -> None:
        """Free its memory. vLLM must not look for it any more."""
        shutil.rmtree(self.directory, ignore_errors=True)
        handoff.withdraw(self.reference)


class AdapterSource:
    """The store at TENSORSERVE_ADAPTERS_URI, for one model."""

    def __init__(self, settings: Settings, base: BaseModel, directory: Path) -> None:
        """`directory`: emptied, and made the place of what vLLM reads."""
        assert settings.adapters_uri is not None
        self._uri = settings.adapters_uri
        self._trust = trust_for(settings)
        self._settings = settings if self._trust is None else with_digests(settings)
        self._base = base
        self._directory = directory
        self._access = store_access(settings)
        self._numbers = itertools.count(1)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, mode=0o700)

    def find(self, name: str) -> Found:
        """The adapter `name`, whose name was checked. Raises AdapterRefused."""
        try:
            return find_adapter(self._settings, name, self._access, self._trust)
        except TensorserveError as error:
            raise refused(error) from error

    def hold(self, found: Found) -> Held:
        """Fetch it, authenticate it, compare it with the model. Raises AdapterRefused."""
        try:
            return self._hold(found)
        except TensorserveError as error:
            raise refused(error) from error

    def _hold(self, found: Found) -> Held:
        uri = sources.join(self._uri, found.name)
        config = self._config(uri, found)
        rank = rank_of(config, f"{CONFIG} of adapter {found.name}")
        if (setting := unserved(read_json(config))) is not None:
            raise ConfigurationError(f"Adapter {found.name} has {setting}, which vLLM refuses.")
        key = adapters_key_for(self._settings)
        image = Holder(uri, self._settings, found.manifest, self._access, key).image(WEIGHTS)
        directory = self._directory / f"{next(self._numbers)}-{found.name}"
        reference = handoff.publish(image, "adapter", survives_exec=False)
        del image
        try:
            _write(directory, config, reference)
            self._check(found, directory, rank)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            handoff.withdraw(reference)
            raise
        return Held(found.name, found.version, found.size, directory, reference)

    def _config(self, uri: str, found: Found) -> bytes:
        entry = next((one for one in found.manifest.files if one.name == CONFIG), None)
        if entry is None or entry.size > MOST_CONFIG_BYTES:
            raise CorruptError(f"Adapter {found.name} has no {CONFIG} in its {MANIFEST}.")
        source = sources.open_source(sources.join(uri, CONFIG), self._access)
        try:
            if source.size == entry.size:
                data = source.read(0, source.size)
                if hashlib.sha256(data).hexdigest() == entry.sha256:
                    return data
        finally:
            source.close()
        raise CorruptError(f"{source.name} is not the file that was packed.")

    def _check(self, found: Found, directory: Path, rank: int) -> None:
        identity = found.manifest.adapter
        shapes: dict[str, Sequence[int]] = {
            name: entry.shape for name, entry in shapes_in(directory).items()
        }
        unfit = misfit(
            shapes, rank, self._base, identity.base_model_name if identity is not None else None
        )
        if unfit is not None:
            raise AdapterRefused(
                unfit.reason,
                UNUSABLE,
                f"adapter {found.name} does not fit the model: {unfit.message}",
                "It was found but could not be loaded: it does not fit the model.",
            )


def _write(directory: Path, config: bytes, reference: str) -> None:
    try:
        directory.mkdir(mode=0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(directory / CONFIG, flags, 0o600), "wb") as file:
            file.write(config)
        (directory / SAFETENSORS).symlink_to(reference)
    except OSError as error:
        raise ConfigurationError(
            f"{directory} could not be written: {error.strerror}.",
            hint="Is the disk full or read-only? Set TENSORSERVE_STATE_DIR to another one.",
        ) from error
