"""What the user asked for: the environment, read once, checked, and frozen.

Every mistake is found and reported, not only the first. What can be set is in `variables`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorserve import vllm_flags
from tensorserve.child_environment import FLAG_ALIASES, child_environment
from tensorserve.errors import ConfigurationError
from tensorserve.secret import REDACTED, Secret, redact_uri
from tensorserve.sources.addresses import host_and_port
from tensorserve.variables import BY_NAME, VARIABLES, Variable, default_state_dir

PREFIX = "TENSORSERVE_"
VLLM_PREFIX = "TENSORSERVE_VLLM_"
HANDOFF_VARIABLE = "TENSORSERVE_INTERNAL_HANDOFF"
MAX_SECRET_FILE_BYTES = 64 * 1024


# boto's own names first; the names that tensorizer's users know are accepted as aliases.
AWS_SECRETS = {
    "AWS_ACCESS_KEY_ID": "S3_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "S3_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN": None,
}
# Used as the bytes that they are.
_BYTES = frozenset({"TENSORSERVE_KEY", "TENSORSERVE_PASSPHRASE"})
# What Kubernetes puts into every pod for a Service (enableServiceLinks).
_SERVICE_LINK = re.compile(
    r"TENSORSERVE_(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)"
)
_LINKED_PORT = re.compile(r"(tcp|udp)://")
AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class S3Settings:
    """How S3 is reached. Without keys, botocore's credential chain is asked (profile, role, …)."""

    endpoint_url: str | None = None
    region: str | None = None
    ca_bundle: str | None = None
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    session_token: Secret | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that the environment says. Build it with `Settings.from_environment`."""

    model_uri: str
    model_name: str | None
    key: Secret | None
    passphrase: Secret | None
    host: str
    port: int
    metrics_host: str
    metrics_port: int
    fetch_connections: int | None
    fetch_deadline: float
    host_memory_limit: int | None
    """Bytes; None: automatic, worked out at the start (host_memory.py)."""
    prefetch: str
    verify: str
    loader: str
    manifest_sha256: str | None
    allowed_hosts: tuple[str, ...]
    engine_restarts: int
    failure_linger: float
    state_dir: Path
    pass_env: tuple[str, ...]
    s3: S3Settings
    flags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(flag name, words for the argument list), in the order of the variables' names."""
    secret_flags: tuple[tuple[str, Secret], ...] = ()
    """Flags whose value must not stand in an argument list (vLLM's API key)."""
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """What the children inherit: the allow-listed part of our own environment."""

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], origins: Mapping[str, str] | None = None
    ) -> Settings:
        """Read and check `environ`. Raises ConfigurationError with every mistake in it.

        `origins` says where handed-over secrets first came from ({variable: origin}).
        """
        return _Reader(environ, origins or {}).settings()

    def shown(self) -> list[tuple[str, str]]:
        """(name, value) of every variable, secrets and signatures redacted, for `plan`."""
        rows = []
        for variable in VARIABLES:
            value = getattr(self, variable.attribute)
            if isinstance(value, Secret):
                text = f"{REDACTED} (from {value.origin})"
            elif variable.private:
                text = redact_uri(value)
            elif value is None or value == ():
                text = variable.shown_default or "none"
            else:
                text = ",".join(value) if isinstance(value, tuple) else str(value)
            rows.append((variable.name, text))
        return rows


def _is_port(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith("_PORT")


class _Reader:
    """Collects problems while it reads, so that a user mends them in one go."""

    def __init__(self, environ: Mapping[str, str], origins: Mapping[str, str]) -> None:
        self.environ = environ
        self.origins = origins
        self.problems: list[str] = []

    def settings(self) -> Settings:
        self._leave_out_kubernetes_links()
        self._refuse_unknown()
        values = {v.attribute: self._value(v) for v in VARIABLES}
        if values["model_uri"] is None and "TENSORSERVE_MODEL_URI" not in self.environ:
            self._problem(
                "TENSORSERVE_MODEL_URI is not set: there is no model to serve.",
                "For example -e TENSORSERVE_MODEL_URI=s3://my-bucket/vllm/my-model/v1",
            )
        if values["key"] is not None and values["passphrase"] is not None:
            self._problem(
                "Both a key and a passphrase are set: a file is sealed with one of them.",
                "Unset TENSORSERVE_KEY(_FILE) or TENSORSERVE_PASSPHRASE(_FILE).",
            )
        if values["key"] is not None:
            self._check_key(values["key"])
        if values["port"] == values["metrics_port"] and values["port"] is not None:
            self._problem(
                f"TENSORSERVE_PORT and TENSORSERVE_METRICS_PORT are both {values['port']}.",
                "Give each its own port.",
            )
        flags, secret_flags = self._flags()
        s3 = self._s3()
        if self.problems:
            count = len(self.problems)
            head = f"{count} mistake{'s' * (count > 1)} in the configuration:"
            raise ConfigurationError(
                "\n".join((head, *self.problems)), problems=tuple(self.problems)
            )
        values["state_dir"] = values["state_dir"] or default_state_dir()
        return Settings(
            **values,
            s3=s3,
            flags=flags,
            secret_flags=secret_flags,
            environment=child_environment(self.environ, values["pass_env"]),
        )

    def _problem(self, message: str, hint: str | None = None) -> None:
        self.problems.append(str(ConfigurationError(message, hint=hint)))

    def _refuse_unknown(self) -> None:
        known = set(BY_NAME) | {f"{v.name}_FILE" for v in VARIABLES if v.secret}
        for name in sorted(self.environ):
            if not name.startswith(PREFIX) or name in known or name == HANDOFF_VARIABLE:
                continue
            if name.startswith(VLLM_PREFIX):
                continue  # checked against vLLM's own flags
            near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
            self._problem(
                f"{name} is not a variable of tensorserve.",
                f"Did you mean {near[0]}?" if near else "`tensorserve plan --help` lists them all.",
            )

    def _leave_out_kubernetes_links(self) -> None:
        """What Kubernetes sets for Services called tensorserve: one message for all of it."""
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
        if not text.strip():
            self._problem(
                f"{variable.name} is empty.", f"Give it a value ({variable.accepts}) or unset it."
            )
            return None
        if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in text):
            self._problem(
                f"{variable.name} has a character that is none (a line break, a NUL, or bytes that "
                "are not UTF-8).",
                "Was it copied with its line break?",
            )
            return None
        try:
            return variable.parse(text, variable.name)
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None

    def _secret(self, name: str) -> Secret | None:
        """The secret `name`; one that is sent somewhere as text has to be text."""
        secret = self._given_secret(name)
        if secret is not None and name not in _BYTES:
            try:
                secret.reveal().decode()
            except UnicodeDecodeError:
                self._problem(f"{secret.origin} is not UTF-8 text.", "Is it the right secret?")
                return None
        return secret

    def _given_secret(self, name: str) -> Secret | None:
        """From itself or from the file that `name_FILE` names."""
        file_name = f"{name}_FILE"
        if name in self.environ and file_name in self.environ:
            self._problem(f"Both {name} and {file_name} are set.", "Set one of them.")
            return None
        if name in self.environ:
            if not self.environ[name]:
                self._problem(f"{name} is empty.", "Give it a value or unset it.")
                return None
            return Secret(self.environ[name], origin=self.origins.get(name, name))
        if file_name not in self.environ:
            return None
        if not self.environ[file_name].strip():
            self._problem(f"{file_name} is empty.", "Give it a path or unset it.")
            return None
        path = Path(self.environ[file_name])
        try:
            with path.open("rb") as file:
                data = file.read(MAX_SECRET_FILE_BYTES + 1)
        except OSError as error:
            self._problem(
                f"{file_name}={path}: {error.strerror}.",
                f"Mount the secret there, readable by this user ({os.getuid()}:{os.getgid()}).",
            )
            return None
        if len(data) > MAX_SECRET_FILE_BYTES:
            self._problem(f"{file_name}={path} is larger than 64 KiB.", "Is it the right file?")
            return None
        # Editors end a file with a newline; a raw 32-byte key may end with one and is left alone.
        stripped = data if len(data) == 32 else data.rstrip(b"\r\n")
        if name == "TENSORSERVE_KEY" and len(stripped) == 32:
            stripped = data  # 32 characters and a line's end are text, not a raw key
        if not stripped:
            self._problem(f"{file_name}={path} is empty.", "Write the secret into it.")
            return None
        return Secret(stripped, origin=f"{file_name}={path}")

    def _check_key(self, key: Secret) -> None:
        from tensorserve.keys import parse_key

        if "TENSORSERVE_KEY" in self.environ and len(key.reveal()) == 32:
            # Handed over from a file it is hex by now.
            self._problem(
                f"The key from {key.origin} is 32 characters of text: a key is 64 hex digits, or "
                "base64 of 32 bytes.",
                "If it is a passphrase, set TENSORSERVE_PASSPHRASE instead. 32 raw bytes are taken "
                "from a file alone: TENSORSERVE_KEY_FILE.",
            )
            return
        try:
            parse_key(key)
        except ConfigurationError as error:
            self.problems.append(str(error))

    def _flags(
        self,
    ) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], tuple[tuple[str, Secret], ...]]:
        plain: list[tuple[str, tuple[str, ...]]] = []
        secret: dict[str, Secret] = {}
        for alias, flag_name in FLAG_ALIASES.items():
            value = (
                self._secret(alias)
                if f"{alias}_FILE" in self.environ or self.environ.get(alias)
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
                try:
                    plain.append((flag.name, flag.arguments(self.environ[name], name)))
                except ConfigurationError as error:
                    self.problems.append(str(error))
        return tuple(plain), tuple(sorted(secret.items(), key=lambda item: item[0]))

    def _s3(self) -> S3Settings:
        secrets: dict[str, Secret | None] = {}
        for name, alias in AWS_SECRETS.items():
            value = self._secret(name)
            other = self._secret(alias) if alias else None
            if value is not None and other is not None and value != other:
                self._problem(f"{name} and {alias} are both set and differ.", "Set one of them.")
            secrets[name] = value or other
        if (secrets["AWS_ACCESS_KEY_ID"] is None) != (secrets["AWS_SECRET_ACCESS_KEY"] is None):
            missing = next(
                n for n in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not secrets[n]
            )
            self._problem(
                f"{missing} is missing while the other half of the pair is set.", "Set both."
            )
        for name in (*AWS_ENDPOINTS, "AWS_ENDPOINT_URL_STS"):
            self._check_endpoint(name)
        endpoint = next((self.environ[n] for n in AWS_ENDPOINTS if self.environ.get(n)), None)
        return S3Settings(
            endpoint_url=endpoint,
            region=self.environ.get("AWS_REGION") or self.environ.get("AWS_DEFAULT_REGION") or None,
            ca_bundle=self.environ.get("AWS_CA_BUNDLE") or None,
            access_key_id=secrets["AWS_ACCESS_KEY_ID"],
            secret_access_key=secrets["AWS_SECRET_ACCESS_KEY"],
            session_token=secrets["AWS_SESSION_TOKEN"],
        )

    def _check_endpoint(self, name: str) -> None:
        endpoint = self.environ.get(name)
        if not endpoint:
            return
        if "@" in endpoint:
            # It would be sent beside the signature, and stand in the children's environment.
            self._problem(
                f"{name} has an @ in it: an endpoint has neither a user nor a password.",
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead.",
            )
            return
        try:
            host_and_port(endpoint, name)
            proper = endpoint.partition("://")[0].lower() in {"http", "https"}
        except ConfigurationError:
            proper = False
        if not proper:
            self._problem(
                f"{name}={redact_uri(endpoint)!r} is not a URL.", "Use https://host:port."
            )


def handed_over(
    environ: Mapping[str, str], settings: Settings
) -> tuple[dict[str, str], dict[str, str]]:
    """(environment, origins) from which another process makes the same `settings`.

    Secrets stand in it by value, not by file: the files may be gone, or not readable there. It is
    for `tensorserve.handoff` only, never for a real environment.
    """
    result = dict(settings.environment)
    result |= {n: v for n, v in environ.items() if n.startswith((PREFIX, "AWS_", "S3_"))}
    values: dict[str, Secret] = {
        f"{VLLM_PREFIX}{name.upper().replace('-', '_')}": value
        for name, value in settings.secret_flags
    }
    if settings.key is not None:
        raw = settings.key.reveal()
        # A raw key is no text: as hex it is the same key.
        values["TENSORSERVE_KEY"] = (
            Secret(raw.hex(), settings.key.origin) if len(raw) == 32 else settings.key
        )
    if settings.passphrase is not None:
        values["TENSORSERVE_PASSPHRASE"] = settings.passphrase
    for name, secret in (
        ("AWS_ACCESS_KEY_ID", settings.s3.access_key_id),
        ("AWS_SECRET_ACCESS_KEY", settings.s3.secret_access_key),
        ("AWS_SESSION_TOKEN", settings.s3.session_token),
    ):
        if secret is not None:
            values[name] = secret
    secret_names = {v.name for v in VARIABLES if v.secret} | set(AWS_SECRETS) | set(values)
    for name in [*secret_names, *(a for a in AWS_SECRETS.values() if a)]:
        result.pop(name, None)
        result.pop(f"{name}_FILE", None)
    result.pop(HANDOFF_VARIABLE, None)
    result["TENSORSERVE_STATE_DIR"] = str(settings.state_dir)
    if settings.host_memory_limit is not None:
        result["TENSORSERVE_HOST_MEMORY_LIMIT"] = str(settings.host_memory_limit)
    result |= {name: secret.reveal_text() for name, secret in values.items()}
    return result, {name: secret.origin for name, secret in values.items()}
