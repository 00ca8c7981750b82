"""What did the user ask for? The environment, read once, checked, and frozen.

All mistakes are reported together. The variables are listed in `variables`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from tensorserve.bundle.signature_trust import SignedBy
from tensorserve.config import vllm_flags
from tensorserve.config.environment import FLAG_ALIASES, child_environment
from tensorserve.config.tidying import PREFIXES, has_controls, stripped, tidied
from tensorserve.config.variables import BY_NAME, VARIABLES, Variable, default_state_dir
from tensorserve.config.vllm_arguments import Argument, Arguments, argument_of
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError
from tensorserve.secret import REDACTED, Secret, redact_uri
from tensorserve.sources.base import AzureAccess, GcsAccess, HubAccess, S3Access
from tensorserve.sources.ssrf_guard import host_and_port
from tensorserve.wrapping.base import VaultAccess

PREFIX = "TENSORSERVE_"
VLLM_PREFIX = "TENSORSERVE_VLLM_"
HANDOFF_VARIABLE = "TENSORSERVE_INTERNAL_HANDOFF"
START_DEADLINE = 1800.0
"""Seconds. On H100s, starts were reported that were silent for 210 s (profiling and warm-up,
vllm#44881) and built kernels for 202 s (vllm#47456); on few cores it is a multiple of that."""


# botocore's names, and the aliases that tensorizer's users know.
AWS_SECRETS = {
    "AWS_ACCESS_KEY_ID": "S3_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "S3_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN": None,
}
# As the Azure command line and azure-identity name them; other tools' aliases.
AZURE_SECRETS = {
    "AZURE_STORAGE_CONNECTION_STRING": None,
    "AZURE_STORAGE_KEY": "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN": None,
    "AZURE_CLIENT_SECRET": None,
}
_HUB_TOKEN = "HF_TOKEN"
_ADAPTERS = "TENSORSERVE_ADAPTERS_"
_ADAPTERS_URI = f"{_ADAPTERS}URI"
# OpenBao's command line takes its own name first.
VAULT_SECRETS = {"BAO_TOKEN": "VAULT_TOKEN"}
_IN_HEADERS = frozenset(
    name
    for pair in (AWS_SECRETS | AZURE_SECRETS | VAULT_SECRETS).items()
    for name in pair
    if name is not None
) | {_HUB_TOKEN, f"{VLLM_PREFIX}{_HUB_TOKEN}"}
# Kept as bytes: they need not be UTF-8.
_BYTES = frozenset(
    {
        "TENSORSERVE_KEY",
        "TENSORSERVE_PASSPHRASE",
        "TENSORSERVE_COMPILED_KEY",
        "TENSORSERVE_COMPILED_SIGNATURE_KEY",
        "TENSORSERVE_SIGNATURE_KEY",
        "TENSORSERVE_SIGNATURE_CERTIFICATES",
        "TENSORSERVE_ADAPTERS_KEY",
    }
)
_RAW_KEYS = frozenset({"TENSORSERVE_KEY", "TENSORSERVE_COMPILED_KEY", "TENSORSERVE_ADAPTERS_KEY"})
# Variables that Kubernetes sets in each pod for a Service (enableServiceLinks).
_SERVICE_LINK = re.compile(
    r"TENSORSERVE_(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)"
)
_LINKED_PORT = re.compile(r"(tcp|udp)://")
# Characters of a value that is sent in a request's header: printable ASCII, no space.
_SENDABLE = re.compile(r"[!-~]*")
# botocore's rule: a region becomes a label of a host name.
_REGION = re.compile(r"(?![0-9]+$)(?!-)[a-zA-Z0-9-]{1,63}(?<!-)")
# Variables that protect something, and what happens without them.
_GUARDS = {
    "TENSORSERVE_KEY": "a model that is not encrypted is served",
    "TENSORSERVE_PASSPHRASE": "a model that is not encrypted is served",
    "TENSORSERVE_KEY_URI": "a model that is not encrypted is served",
    "TENSORSERVE_KEY_FINGERPRINT": "any key is accepted",
    "TENSORSERVE_MANIFEST_SHA256": "any bundle is served",
    "TENSORSERVE_SIGNATURE_KEY": "the bundle needs no signature",
    "TENSORSERVE_SIGNATURE_CERTIFICATES": "the bundle needs no signature",
    "TENSORSERVE_VERIFY": "auto decides",
    "TENSORSERVE_COMPILED_KEY": "the model's key opens compiled code",
    "TENSORSERVE_COMPILED_SIGNATURE_KEY": "compiled code needs no signature",
    "TENSORSERVE_ADAPTERS_KEY": "the model's key opens adapters",
    "TENSORSERVE_ADAPTERS_ALLOW": "adapters of all names are served",
    "TENSORSERVE_VLLM_API_KEY": "the API needs no key",
}
AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")
_ENDPOINTS = (*AWS_ENDPOINTS, "AWS_ENDPOINT_URL_STS")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_EMULATOR = "STORAGE_EMULATOR_HOST"
_PAIR = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Of the variables that say how a store is reached (Variable.attribute).
_S3_ATTRIBUTES = "s3."
_GCS_ATTRIBUTES = "gcs."
_VAULT_ATTRIBUTES = "vault."


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
        return _Reader(environ).source_settings()


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
        return _Reader(environ).settings()

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
            else:
                text = ",".join(value) if isinstance(value, tuple) else str(value)
            rows.append((variable.name, text))
        return rows


def metrics_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) where `environ` has the metrics listen. Raises ConfigurationError."""
    reader = _Reader(environ)
    values = reader.values("metrics_host", "metrics_port")
    reader.raise_problems()
    return values["metrics_host"], values["metrics_port"]


_SOURCE_ATTRIBUTES = frozenset(
    v.attribute
    for v in VARIABLES
    if v.attribute.startswith((_S3_ATTRIBUTES, _GCS_ATTRIBUTES, _VAULT_ATTRIBUTES))
    or v.attribute in {one.name for one in fields(SourceSettings)}
)


def _is_port(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith("_PORT")


def _unsigned_adapters(values: dict[str, Any]) -> Iterator[str]:
    """A warning where only the model has to be signed."""
    signature = values["signature_key"] or values["signature_certificates"]
    if signature is not None and values["adapters_uri"] is not None:
        yield (
            "a signature is needed of the model, not of adapters: whoever has their key and can "
            f"write to {_ADAPTERS_URI} can add some."
        )


class _Reader:
    """Reads an environment and collects all problems, so that they are reported together."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.given = environ
        self.environ: Mapping[str, str] = tidied(environ)
        self.problems: list[str] = []

    def settings(self) -> Settings:
        self._refuse_misplaced()
        values = self.values(*(v.attribute for v in VARIABLES))
        if values["model_uri"] is None and "TENSORSERVE_MODEL_URI" not in self.environ:
            empty = " (it is empty)" if "TENSORSERVE_MODEL_URI" in self.given else ""
            self._problem(
                f"TENSORSERVE_MODEL_URI is not set{empty}: there is no model to serve.",
                "For example -e TENSORSERVE_MODEL_URI=s3://my-bucket/vllm/my-model/v1",
            )
        self._check_keys(values)
        if values["port"] == values["metrics_port"] and values["port"] is not None:
            self._problem(
                f"TENSORSERVE_PORT and TENSORSERVE_METRICS_PORT are both {values['port']}.",
                "Give each its own port.",
            )
        self._settle_deadlines(values)
        self._check_adapters(values)
        flags, secret_flags = self._flags()
        stores = self._stores(values, dict(secret_flags).get(FLAG_ALIASES[_HUB_TOKEN]))
        self.raise_problems()
        values["state_dir"] = values["state_dir"] or default_state_dir(self.environ)
        return Settings(
            **values,
            **stores,
            flags=flags,
            secret_flags=secret_flags,
            environment=child_environment(self.environ, values["pass_env"]),
            warnings=(*self._empty_guards(), *_unsigned_adapters(values)),
        )

    def source_settings(self) -> SourceSettings:
        self._refuse_misplaced()
        values = self.values(*_SOURCE_ATTRIBUTES)
        self._check_keys(values)
        stores = self._stores(values, self._secret(_HUB_TOKEN))
        self.raise_problems()
        return SourceSettings(**values, **stores, warnings=self._empty_guards())

    def values(self, *attributes: str) -> dict[str, Any]:
        """What the variables of `attributes` say."""
        return {v.attribute: self._value(v) for v in VARIABLES if v.attribute in attributes}

    def raise_problems(self) -> None:
        """Raises ConfigurationError with every mistake that was found."""
        if self.problems:
            count = len(self.problems)
            head = f"{count} mistake{'s' * (count > 1)} in the configuration:"
            raise ConfigurationError(
                "\n".join((head, *self.problems)), problems=tuple(self.problems)
            )

    def _refuse_misplaced(self) -> None:
        self._leave_out_kubernetes_links()
        self._refuse_unknown()
        self._refuse_controls()

    def _check_keys(self, values: dict[str, Any]) -> None:
        """Check keys and passphrase; replaces keys by their 32 bytes."""
        if values["key"] is not None and values["passphrase"] is not None:
            self._problem(
                "Both a key and a passphrase are set: a file is sealed with one of them.",
                "Unset TENSORSERVE_KEY(_FILE) or TENSORSERVE_PASSPHRASE(_FILE).",
            )
        given = [name for name in ("key", "passphrase") if values[name] is not None]
        if given and values["key_uri"] is not None:
            self._problem(f"Both TENSORSERVE_KEY_URI and a {given[0]} are set.", "Set one of them.")
        if values["passphrase"] is not None and values["key_fingerprint"] is not None:
            self._problem(
                "TENSORSERVE_KEY_FINGERPRINT is for keys, and a passphrase is set.",
                "Unset one of them; TENSORSERVE_MANIFEST_SHA256 pins a bundle.",
            )
        for name in ("key", "compiled_key", "adapters_key"):
            if values.get(name) is not None:
                values[name] = self._parsed_key(values[name], f"TENSORSERVE_{name.upper()}")
        if values.get("compiled_signature_key") is not None:
            self._check_public_key(values["compiled_signature_key"])
        self._check_trust(values)

    def _check_adapters(self, values: dict[str, Any]) -> None:
        """What is said of adapters means nothing without the place where they are found."""
        if values["adapters_uri"] is not None or _ADAPTERS_URI in self.environ:
            return
        for name in sorted(self.environ):
            if name.removesuffix("_FILE") in BY_NAME and name.startswith(_ADAPTERS):
                self._problem(
                    f"{name} is set, and {_ADAPTERS_URI} is not.",
                    f"Set {_ADAPTERS_URI} to where the adapters are, or unset {name}.",
                )

    def _settle_deadlines(self, values: dict[str, Any]) -> None:
        """A start must be able to wait for its source; the one that is not given follows."""
        start, fetch = values["start_deadline"], values["fetch_deadline"] or 0.0  # None: a problem
        if start is None:
            values["start_deadline"] = max(START_DEADLINE, 2 * fetch)
        elif 0 < start <= fetch:
            if "TENSORSERVE_FETCH_DEADLINE" not in self.environ:
                values["fetch_deadline"] = start / 2
                return
            self._problem(
                f"TENSORSERVE_START_DEADLINE={start:g} is not more than "
                f"TENSORSERVE_FETCH_DEADLINE={fetch:g}: a start that waits for its source would be "
                "ended.",
                "Raise the first or lower the second.",
            )

    def _problem(self, message: str, hint: str | None = None) -> None:
        self.problems.append(str(ConfigurationError(message, hint=hint)))

    def _refuse_unknown(self) -> None:
        known = set(BY_NAME) | {f"{v.name}_FILE" for v in VARIABLES if v.secret}
        # Empty ones too: an unknown name is a mistake whatever its value.
        for name in sorted({*self.environ, *(n for n, v in self.given.items() if not v.strip())}):
            if not name.startswith(PREFIX) or name in known or name == HANDOFF_VARIABLE:
                continue
            if name.startswith(VLLM_PREFIX):
                continue  # checked against vLLM's flags in _flags
            near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
            self._problem(
                f"{name} is not a variable of tensorserve.",
                f"Did you mean {near[0]}?" if near else "`tensorserve plan --help` lists them all.",
            )

    def _refuse_controls(self) -> None:
        """Refuse control characters in variables that libraries read: they would raise in there.

        Variables that are parsed here are checked where they are parsed.
        """
        parsed = {*_IN_HEADERS, *_REGIONS, *_ENDPOINTS}
        for name in sorted(self.environ.keys() - parsed):
            others = name.startswith(PREFIXES) and not name.startswith(PREFIX)
            if others and has_controls(self.environ[name]):
                self._bad_character(name)

    def _bad_character(self, name: str) -> None:
        self._problem(
            f"{name} has a character inside that it cannot have (a line break or another control "
            "character, or bytes that are not UTF-8).",
            "Was it copied with its line break, or are two values in it?",
        )

    def _empty_guards(self) -> tuple[str, ...]:
        """A warning for each protecting variable that is set to an empty value."""
        return tuple(
            f"{name} is set to nothing, as if it were not set: {without}."
            for guard, without in _GUARDS.items()
            for name in (guard, f"{guard}_FILE")
            if name in self.given
            and not {guard, f"{guard}_FILE", guard.removeprefix(PREFIX)} & self.environ.keys()
        )

    def _leave_out_kubernetes_links(self) -> None:
        """Report the variables of a Kubernetes Service named tensorserve as one problem."""
        links = {name for name in self.environ if _SERVICE_LINK.fullmatch(name)}
        if not links:
            return
        links |= {n for n, text in self.environ.items() if _LINKED_PORT.match(text) and _is_port(n)}
        self.environ = {name: text for name, text in self.environ.items() if name not in links}
        self._problem(
            f"Kubernetes has set {min(links)} and {len(links) - 1} more, for a Service whose name "
            "begins with `tensorserve`.",
            "Set `enableServiceLinks: false` in the pod's spec (docs/kubernetes.md), or give the "
            "Service another name.",
        )

    def _value(self, variable: Variable) -> Any:
        if variable.secret:
            return self._secret(variable.name)
        text = self.environ.get(variable.name)
        if text is None:
            return variable.default
        if has_controls(text):
            self._bad_character(variable.name)
            return None
        try:
            return variable.parse(text, variable.name)
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None

    def _secret(self, name: str) -> Secret | None:
        """The secret `name`. One that is sent as text must be UTF-8 without control characters."""
        secret = self._given_secret(name)
        if secret is None or name in _BYTES:
            return secret
        try:
            text = stripped(secret.reveal().decode())
        except UnicodeDecodeError:
            self._problem(f"{secret.origin} is not UTF-8 text.", "Is it the right secret?")
            return None
        if not text:
            self._problem(f"{secret.origin} is empty.", "Write the secret into it.")
            return None
        # Credentials are sent in headers unchanged. An API key may have more characters.
        sendable = _SENDABLE.fullmatch(text) if name in _IN_HEADERS else not has_controls(text)
        if not sendable:
            self._problem(
                f"{secret.origin} has a character that no such value has (white space, a line "
                "break, a letter with an accent, a quotation mark of a word processor).",
                "Copy the value alone, without quotes or spaces around it.",
            )
            return None
        return Secret(text, secret.origin)

    def _given_secret(self, name: str) -> Secret | None:
        """The value of `name`, or the content of the file that `name_FILE` names."""
        file_name = f"{name}_FILE"
        if name in self.environ and file_name in self.environ:
            self._problem(f"Both {name} and {file_name} are set.", "Set one of them.")
            return None
        if name in self.environ:
            return Secret(self.environ[name], origin=name)
        if file_name not in self.environ:
            return None
        if has_controls(self.environ[file_name]):
            self._bad_character(file_name)
            return None
        path = Path(self.environ[file_name])
        origin = f"{file_name}={path}"
        try:
            data = read_secret(path, origin).reveal()
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None
        # Editors add a newline. A raw 32-byte key may end with that byte and is kept as it is.
        stripped = data if len(data) == 32 else data.rstrip(b"\r\n")
        if name in _RAW_KEYS and len(stripped) == 32:
            stripped = data  # 32 characters and a line end are text, not a raw key
        if not stripped:
            self._problem(f"{origin} is empty.", "Write the secret into it.")
            return None
        return Secret(stripped, origin)

    def _check_public_key(self, key: Secret) -> None:
        from tensorserve.crypto.ed25519 import VerifyingKey

        try:
            VerifyingKey.parse(key)
        except ConfigurationError as error:
            self.problems.append(str(error))

    def _check_trust(self, values: dict[str, Any]) -> None:
        from tensorserve.bundle.signature_trust import TrustedCertificates, TrustedKeys

        kinds: dict[str, type[TrustedKeys | TrustedCertificates]] = {
            "signature_key": TrustedKeys,
            "signature_certificates": TrustedCertificates,
        }
        given = {name: values[name] for name in kinds if values[name] is not None}
        if len(given) > 1:
            self._problem(
                "Both TENSORSERVE_SIGNATURE_KEY and TENSORSERVE_SIGNATURE_CERTIFICATES are set: a "
                "bundle has one signature.",
                "Set one of them. The first may hold several keys.",
            )
        for name, secret in given.items():
            try:
                kinds[name].parse(secret)
            except ConfigurationError as error:
                self.problems.append(str(error))

    def _parsed_key(self, key: Secret, name: str) -> Secret | None:
        from tensorserve.bundle.keys import parse_key

        if name in self.environ and len(key.reveal()) == 32:
            self._problem(
                f"The key from {key.origin} is 32 characters of text: a key is 64 hex digits, or "
                "base64 of 32 bytes.",
                "If it is a passphrase, set TENSORSERVE_PASSPHRASE instead. 32 raw bytes are taken "
                f"from a file alone: {name}_FILE.",
            )
            return None
        try:
            return Secret(parse_key(key).reveal(), key.origin)
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None

    def _flags(self) -> tuple[Arguments, tuple[tuple[str, Secret], ...]]:
        plain: list[Argument | None] = []
        secret: dict[str, Secret] = {}
        for alias, flag_name in FLAG_ALIASES.items():
            value = (
                self._secret(alias)
                if f"{alias}_FILE" in self.environ or alias in self.environ
                else None
            )
            if value is not None:
                secret[flag_name] = value
        for name in sorted(self.environ):
            if not name.startswith(VLLM_PREFIX):
                continue
            suffix = name.removeprefix(VLLM_PREFIX)
            flag = vllm_flags.flag_for(suffix)
            if flag is None and suffix.endswith("_FILE"):
                flag = vllm_flags.flag_for(suffix.removesuffix("_FILE"))
                if flag is not None and flag.name not in vllm_flags.SECRET:
                    flag = None
            if flag is None:
                near = vllm_flags.nearest_flag(suffix)
                variable = f"{VLLM_PREFIX}{near.upper().replace('-', '_')}" if near else None
                self._problem(
                    f"{name}: `vllm serve` {vllm_flags.VLLM_VERSION} has no flag "
                    f"--{suffix.lower().replace('_', '-')}.",
                    f"Did you mean {variable}?" if variable else "See `vllm serve --help=all`.",
                )
            elif flag.name in vllm_flags.SECRET:
                value = self._secret(name.removesuffix("_FILE"))
                if value is not None:
                    secret[flag.name] = value
            elif flag.name in vllm_flags.OWNED:
                self._problem(f"{name} cannot be set.", f"{vllm_flags.OWNED[flag.name]}.")
            elif flag.name in vllm_flags.RENAMED:
                self._problem(
                    f"{name} has a variable of its own.", f"Set {vllm_flags.RENAMED[flag.name]}."
                )
            else:
                if has_controls(self.environ[name], allowed="\t\r\n"):  # JSON, a chat template
                    self._bad_character(name)
                    continue
                try:
                    plain.append(argument_of(flag, self.environ[name], name))
                except ConfigurationError as error:
                    self.problems.append(str(error))
        flags = Arguments(tuple(argument for argument in plain if argument is not None))
        return flags, tuple(sorted(secret.items(), key=lambda item: item[0]))

    def _stores(self, values: dict[str, Any], hub_token: Secret | None) -> dict[str, Any]:
        """How each kind of source is reached; takes what belongs to them out of `values`."""
        s3, gcs = _taken(values, _S3_ATTRIBUTES), _taken(values, _GCS_ATTRIBUTES)
        vault = _taken(values, _VAULT_ATTRIBUTES)
        return {
            "s3": self._s3(s3),
            "gcs": GcsAccess(**gcs, emulator_host=self._endpoint(_EMULATOR)),
            "azure": self._azure(),
            "hub": self._hub(hub_token),
            "vault": self._vault(vault),
        }

    def _vault(self, own: dict[str, Any]) -> VaultAccess:
        if own["kubernetes_role"] and own["role_id"]:
            self._problem(
                "TENSORSERVE_VAULT_KUBERNETES_ROLE and TENSORSERVE_VAULT_ROLE_ID are both set.",
                "Set one of them: it says how to log in to Vault.",
            )
        if (own["role_id"] is None) != (own["secret_id"] is None):
            self._problem(
                "Of TENSORSERVE_VAULT_ROLE_ID and TENSORSERVE_VAULT_SECRET_ID(_FILE) one is set "
                "without the other.",
                "Set both.",
            )
        address = next((name for name in ("BAO_ADDR", "VAULT_ADDR") if name in self.environ), None)
        return VaultAccess(
            **own,
            address=None if address is None else self._endpoint(address),
            namespace=self._either("BAO_NAMESPACE", "VAULT_NAMESPACE"),
            ca_file=self._either("BAO_CACERT", "VAULT_CACERT", "BAO_CAPATH", "VAULT_CAPATH"),
            token=self._secrets(VAULT_SECRETS)["BAO_TOKEN"],
        )

    def _either(self, *names: str) -> str | None:
        """The value of the first of `names` that is set."""
        return next((self.environ[name] for name in names if name in self.environ), None)

    def _hub(self, token: Secret | None) -> HubAccess:
        endpoint = self._endpoint("HF_ENDPOINT")
        return HubAccess(token=token) if endpoint is None else HubAccess(endpoint, token)

    def _endpoint(self, name: str) -> str | None:
        """The URL in `name`, or host:port as STORAGE_EMULATOR_HOST may have it."""
        given = self.environ.get(name)
        if given is None:
            return None
        url = f"http://{given}" if name == _EMULATOR and "://" not in given else given
        return url.rstrip("/") if self._check_endpoint(name, url) else None

    def _azure(self) -> AzureAccess:
        secrets = self._secrets(AZURE_SECRETS)
        account, other = (
            self.environ.get(name)
            for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
        )
        if account and other and account != other:
            self._problem(
                "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_ACCOUNT_NAME are both set and differ.",
                "Set one of them.",
            )
        return AzureAccess(
            account=account or other,
            connection_string=secrets["AZURE_STORAGE_CONNECTION_STRING"],
            account_key=secrets["AZURE_STORAGE_KEY"],
            sas_token=secrets["AZURE_STORAGE_SAS_TOKEN"],
            tenant_id=self.environ.get("AZURE_TENANT_ID"),
            client_id=self.environ.get("AZURE_CLIENT_ID"),
            client_secret=secrets["AZURE_CLIENT_SECRET"],
        )

    def _secrets(self, names: Mapping[str, str | None]) -> dict[str, Secret | None]:
        """{name: its secret}, which may be set under its alias instead."""
        secrets: dict[str, Secret | None] = {}
        for name, alias in names.items():
            value = self._secret(name)
            other = self._secret(alias) if alias else None
            if value is not None and other is not None and value != other:
                self._problem(f"{name} and {alias} are both set and differ.", "Set one of them.")
            secrets[name] = value or other
        return secrets

    def _s3(self, own: dict[str, Any]) -> S3Access:
        secrets = self._secrets(AWS_SECRETS)
        missing = [name for name in _PAIR if not self._is_given(name, AWS_SECRETS[name])]
        if len(missing) == 1:
            self._problem(
                f"{missing[0]} is missing while the other half of the pair is set.", "Set both."
            )
        for name in _ENDPOINTS:
            if self.environ.get(name):
                self._check_endpoint(name, self.environ[name])
        endpoint = next((self.environ[n] for n in AWS_ENDPOINTS if n in self.environ), None)
        if endpoint is not None:
            scheme, separator, place = endpoint.partition("://")
            endpoint = f"{scheme.lower()}{separator}{place}"
        for name in _REGIONS:
            region = self.environ.get(name)
            if region is not None and not _REGION.fullmatch(region):
                self._problem(
                    f"{name}={region[:80]!r} is not the name of a region.",
                    f"It has letters, digits and hyphens: {name}=eu-central-1.",
                )
        return S3Access(
            **own,
            endpoint_url=endpoint,
            region=self.environ.get("AWS_REGION") or self.environ.get("AWS_DEFAULT_REGION"),
            ca_bundle=self.environ.get("AWS_CA_BUNDLE"),
            access_key_id=secrets["AWS_ACCESS_KEY_ID"],
            secret_access_key=secrets["AWS_SECRET_ACCESS_KEY"],
            session_token=secrets["AWS_SESSION_TOKEN"],
        )

    def _is_given(self, *names: str | None) -> bool:
        """Whether one of `names` is set, valid or not, as a value or as a file."""
        return any(name in self.environ or f"{name}_FILE" in self.environ for name in names if name)

    def _check_endpoint(self, name: str, endpoint: str) -> bool:
        """Whether `endpoint`, of the variable `name`, is a URL; else a problem is noted."""
        if "@" in endpoint:
            # User info would be sent beside the signature, and inherited by child processes.
            self._problem(
                f"{name} has an @ in it: an endpoint has neither a user nor a password.",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
                if name in _ENDPOINTS
                else "Credentials have variables of their own (docs/clouds.md).",
            )
            return False
        try:
            host_and_port(endpoint, name)
            scheme = endpoint.partition("://")[0].lower()
            proper = (
                scheme in {"http", "https"}
                and not has_controls(endpoint)
                and not re.search(r"\s", endpoint)
            )
        except ConfigurationError:
            proper = False
        if not proper:
            self._problem(
                f"{name}={redact_uri(endpoint)!r} is not a URL.", "Use https://host:port."
            )
        return proper


def _taken(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What stands under `prefix` in `values`, without it, and not there any more."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in names}
