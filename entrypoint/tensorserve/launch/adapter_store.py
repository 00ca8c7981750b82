"""Which adapter is in the store (TENSORSERVE_ADAPTERS_URI) under a name, as its manifest says?

The rest of it is fetched while the engine serves (engine/adapters/source.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorserve import sources
from tensorserve.bundle.adapters import WEIGHTS
from tensorserve.bundle.manifest import KEY, Manifest, TensorsEntry, read_manifest
from tensorserve.bundle.model_signature import read_signature
from tensorserve.bundle.signature_trust import Trust
from tensorserve.bundle.signed_bundle import check_manifest
from tensorserve.config.access import access_for, adapters_key_for
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.sources import Access, NotFoundError, RetryPolicy

# A client waits for the answer. A start has TENSORSERVE_FETCH_DEADLINE.
_MOST_DEADLINE = 30.0
_CONNECTIONS = 4


@dataclass(frozen=True)
class Found:
    """An adapter that is in the store, as its authenticated manifest says."""

    name: str
    manifest: Manifest
    entry: TensorsEntry

    @property
    def version(self) -> str:
        """SHA-256 of its manifest, which has the digests of everything else."""
        return self.manifest.sha256

    @property
    def size(self) -> int:
        """Bytes that it takes of the memory for adapters."""
        return self.entry.size


def store_access(settings: Settings) -> Access:
    """How the store is reached: as the model's, but no client waits for minutes."""
    access = access_for(settings)
    deadline = min(settings.fetch_deadline, _MOST_DEADLINE)
    return replace(access, policy=RetryPolicy(deadline=deadline), connections=_CONNECTIONS)


def find_adapter(settings: Settings, name: str, access: Access, trust: Trust | None) -> Found:
    """The adapter `name` in the store of `settings`. Its manifest is authenticated where there is a
    key; before that, it has to be signed by whom `trust` accepts (config/signature.trust_for).

    Raises NotFoundError where there is none, SignatureError and CorruptError for what is not
    signed, not authentic or another adapter, and the errors of the sources and of the key.
    """
    assert settings.adapters_uri is not None
    uri = sources.join(settings.adapters_uri, name)
    key = adapters_key_for(settings)
    if trust is None:
        manifest = read_manifest(uri, access, key)
    else:
        manifest = check_manifest(read_signature(uri, access, trust), uri, access, key)
    if manifest is None:
        raise NotFoundError(f"There is no adapter {name} in the store.")
    if key is not None and manifest.authenticated_by != KEY:
        raise CorruptError(
            f"Adapter {name} is not encrypted, and there is a key.",
            hint="Pack it with the key: `tensorserve pack-adapter … --encrypt`.",
        )
    if manifest.adapter is None or WEIGHTS not in manifest.tensors_files:
        raise CorruptError(
            f"What is stored under the name {name} is not an adapter that `tensorserve "
            "pack-adapter` made."
        )
    if manifest.adapter.name != name:
        raise CorruptError(
            f"What is stored under the name {name} is the adapter {manifest.adapter.name}: it was "
            "copied to another folder.",
            hint=f"Pack it again for the name {name}.",
        )
    if key is None and manifest.encryption is not None:
        raise ConfigurationError(
            f"Adapter {name} is encrypted, and there is no key.",
            hint="Set TENSORSERVE_ADAPTERS_KEY_FILE.",
        )
    return Found(name, manifest, manifest.tensors_files[WEIGHTS])
