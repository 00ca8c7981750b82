"""What did the user ask for? The environment, read once, checked, and frozen.

All mistakes are reported together. The variables are listed in `variables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from tensorserve.bundle.signature_trust import SignedBy
from tensorserve.config.environment import FLAG_ALIASES, child_environment
from tensorserve.config.flag_settings import read_flags
from tensorserve.config.key_settings import check_keys
from tensorserve.config.misplaced import empty_guards, refuse_misplaced
from tensorserve.config.secret_names import HUB_TOKEN
from tensorserve.config.store_settings import STORE_ATTRIBUTES, read_stores
from tensorserve.config.variable_reader import VariableReader
from tensorserve.config.variables import BY_NAME, VARIABLES, default_state_dir
from tensorserve.config.vllm_arguments import Arguments
from tensorserve.secret import REDACTED, Secret, redact_uri
from tensorserve.sources.base import AzureAccess, GcsAccess, HubAccess, S3Access
from tensorserve.wrapping.base import VaultAccess

START_DEADLINE = 1800.0
"""Seconds. On H100s, starts were reported that were silent for 210 s (profiling and warm-up,
vllm#44881) and built kernels for 202 s (vllm#47456); on few cores it is a multiple of that."""
_ADAPTERS = "TENSORSERVE_ADAPTERS_"
_ADAPTERS_URI = f"{_ADAPTERS}URI"


@dataclass(frozen=True)
class SourceSettings:
    """What the environment says of a bundle's source and key, for commands that name its URI."""

    key: Secret | None
    """32 bytes."""
    passphrase: Secret | None
    key_uri: str | None
    """Who unwraps the key (wrapping.base.Reference); config/unwrapping.py then fills `key`."""
    key_fingerprint: str | None
    cdh_url: str
    """The Confidential Data Hub of this guest (wrapping/kbs.py)."""
    fetch_connections: int | None
    fetch_deadline: float
    """Seconds."""
    verify: str
    manifest_sha256: str | None
    signature_key: Secret | None
    """PEM."""
    signature_certificates: Secret | None
    """PEM."""
    signature_identity: str | None
    """Of Sigstore's keyless signing; issuer and trust root are there with it."""
    signature_issuer: str | None
    signature_trust_root: Secret | None
    """JSON."""
    allowed_hosts: tuple[str, ...]
    compiled_key: Secret | None
    """32 bytes."""
    compiled_signature_key: Secret | None
    """PEM."""
    s3: S3Access
    gcs: GcsAccess
    azure: AzureAccess
    hub: HubAccess
    vault: VaultAccess
    warnings: tuple[str, ...] = field(compare=False)
    """Settings that were possibly not intended, to be printed."""
    signed_by: SignedBy | None = field(default=None, kw_only=True)
    """Who signed the bundle, once that is known (config/signature.py)."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> SourceSettings:
        """Read and check what is needed. Raises ConfigurationError with every mistake in it."""
        return _source_settings(VariableReader(environ))


@dataclass(frozen=True)
class Settings(SourceSettings):
    """Everything that the environment says. Build it with `Settings.from_environment`."""

    model_uri: str
    model_name: str | None
    host: str
    port: int
    metrics_host: str
    metrics_port: int
    host_memory_limit: int | None
    """Bytes; None: automatic, worked out at the start (launch/memory_budget.py)."""
    prefetch: str
    loader: str
    compiled: str
    """One of `auto`, `off`, `required`."""
    share_load: str
    """One of `auto`, `on`, `off`."""
    adapters_uri: str | None
    """Where adapters are found while serving."""
    adapters_key: Secret | None
    """32 bytes."""
    adapters_allow: tuple[str, ...]
    """Names, with `*` for any characters; empty: all."""
    adapters_ttl: float
    """Seconds."""
    adapters_count: int
    adapters_memory: int
    """Bytes."""
    import_once: str
    engine_restarts: int
    start_deadline: float
    """Seconds; 0: none."""
    failure_linger: float
    """Seconds."""
    state_dir: Path
    pass_env: tuple[str, ...]
    flags: Arguments
    """Of `vllm serve`, in the order of the variables' names."""
    secret_flags: tuple[tuple[str, Secret], ...]
    """Flags whose value must not stand in an argument list (vLLM's API key)."""
    environment: tuple[tuple[str, str], ...] = field(repr=False)
    """What child processes inherit: the allow-listed part of this process's environment."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check `environ`. Raises ConfigurationError with every mistake in it."""
        return _settings(VariableReader(environ))

    def shown(self) -> list[tuple[str, str]]:
        """(name, value) of every variable, secrets and signatures redacted, for `plan`."""
        rows = []
        for variable in VARIABLES:
            value = attrgetter(variable.attribute)(self)
            if isinstance(value, Secret):
                text = f"{REDACTED} (from {value.origin})"
            elif variable.private and value is not None:
                text = redact_uri(value)
            elif value is None or value == ():
                text = variable.shown_default or "none"
            elif isinstance(value, bool):
                text = str(value).lower()
            elif isinstance(value, float):
                text = f"{value:g}"
            else:
                text = ",".join(value) if isinstance(value, tuple) else str(value)
            rows.append((variable.name, text))
        return rows


def metrics_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) where `environ` has the metrics listen. Raises ConfigurationError."""
    reader = VariableReader(environ)
    values = reader.values("metrics_host", "metrics_port")
    reader.raise_problems()
    return values["metrics_host"], values["metrics_port"]


_SOURCE_ATTRIBUTES = STORE_ATTRIBUTES | {
    v.attribute for v in VARIABLES if v.attribute in {one.name for one in fields(SourceSettings)}
}


def _settings(reader: VariableReader) -> Settings:
    refuse_misplaced(reader)
    values = reader.values(*(v.attribute for v in VARIABLES))
    if values["model_uri"] is None and "TENSORSERVE_MODEL_URI" not in reader.environ:
        empty = " (it is empty)" if "TENSORSERVE_MODEL_URI" in reader.given else ""
        reader.problem(
            f"TENSORSERVE_MODEL_URI is not set{empty}: there is no model to serve.",
            "For example -e TENSORSERVE_MODEL_URI=s3://my-bucket/vllm/my-model/v1",
        )
    check_keys(reader, values)
    if values["port"] == values["metrics_port"] and values["port"] is not None:
        reader.problem(
            f"TENSORSERVE_PORT and TENSORSERVE_METRICS_PORT are both {values['port']}.",
            "Give each its own port.",
        )
    _settle_deadlines(reader, values)
    _check_adapters(reader, values)
    flags, secret_flags = read_flags(reader)
    stores = read_stores(reader, values, dict(secret_flags).get(FLAG_ALIASES[HUB_TOKEN]))
    reader.raise_problems()
    values["state_dir"] = values["state_dir"] or default_state_dir(reader.environ)
    return Settings(
        **values,
        **stores,
        flags=flags,
        secret_flags=secret_flags,
        environment=child_environment(reader.environ, values["pass_env"]),
        warnings=tuple(empty_guards(reader)),
    )


def _source_settings(reader: VariableReader) -> SourceSettings:
    refuse_misplaced(reader)
    values = reader.values(*_SOURCE_ATTRIBUTES)
    check_keys(reader, values)
    stores = read_stores(reader, values, reader.secret(HUB_TOKEN))
    reader.raise_problems()
    return SourceSettings(**values, **stores, warnings=empty_guards(reader))


def _check_adapters(reader: VariableReader, values: dict[str, Any]) -> None:
    """What is said of adapters means nothing without the place where they are found."""
    if values["adapters_uri"] is not None or _ADAPTERS_URI in reader.environ:
        return
    for name in sorted(reader.environ):
        if name.removesuffix("_FILE") in BY_NAME and name.startswith(_ADAPTERS):
            reader.problem(
                f"{name} is set, and {_ADAPTERS_URI} is not.",
                f"Set {_ADAPTERS_URI} to where the adapters are, or unset {name}.",
            )


def _settle_deadlines(reader: VariableReader, values: dict[str, Any]) -> None:
    """A start must be able to wait for its source; the one that is not given follows."""
    start, fetch = values["start_deadline"], values["fetch_deadline"] or 0.0  # None: a problem
    if start is None:
        values["start_deadline"] = max(START_DEADLINE, 2 * fetch)
    elif 0 < start <= fetch:
        if "TENSORSERVE_FETCH_DEADLINE" not in reader.environ:
            values["fetch_deadline"] = start / 2
            return
        reader.problem(
            f"TENSORSERVE_START_DEADLINE={start:g} is not more than "
            f"TENSORSERVE_FETCH_DEADLINE={fetch:g}: a start that waits for its source would be "
            "ended.",
            "Raise the first or lower the second.",
        )
