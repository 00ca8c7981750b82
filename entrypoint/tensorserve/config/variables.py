"""Which variables are there, and how is each read?

The only list of the public interface: docs/configuration.md and the README's table are made from
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri
from tensorserve.sources.schemes import EXAMPLES, SCHEMES
from tensorserve.sources.ssrf_guard import host_and_port
from tensorserve.wrapping.base import CDH_URL, VaultAccess
from tensorserve.wrapping.providers import parse_reference


@dataclass(frozen=True)
class Variable:
    """One variable of the public interface.

    ``secret`` variables may also be given as NAME_FILE and are never shown;
    ``private`` ones (a presigned URI) are shown redacted and never put into a child's environment.
    """

    name: str
    attribute: str
    parse: Callable[[str, str], Any]
    default: Any
    meaning: str
    accepts: str
    secret: bool = False
    private: bool = False
    shown_default: str | None = None


# Few enough digits for int(), which refuses more than 4,300 in its own words.
_WHOLE = re.compile(r"[0-9]{1,18}")


def _short(value: str) -> str:
    """`value` for a message, cut to 80 characters."""
    return repr(value if len(value) <= 80 else f"{value[:80]}…")


def _text(value: str, _name: str) -> str:
    return value


def parse_host(value: str, name: str) -> str:
    """A name or an address, without the brackets that a URL puts around an IPv6 one.

    Raises ConfigurationError, naming `name`, for what is neither.
    """
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    proper = not re.search(r"[\s/?#@\[\]\\]", host)
    if proper and ":" in host:
        try:
            ip_address(host)
        except ValueError:
            proper = False
    if proper:
        return host
    raise ConfigurationError(
        f"{name}={_short(value)} is not the name or address of a host.",
        hint=f"For example {name}=127.0.0.1; a port has a setting of its own.",
    )


# Schemes of other tools, and what to do instead.
_ELSEWHERE = {
    **dict.fromkeys(
        ("huggingface", "hub"), "Use hf://organisation/model for a bundle in a hub's repository."
    ),
    "gcs": "Use gs://bucket/prefix.",
    **dict.fromkeys(
        ("azure", "abfs", "abfss", "wasb", "wasbs"),
        "Use az://container/prefix, with the storage account in AZURE_STORAGE_ACCOUNT.",
    ),
    **dict.fromkeys(("s3a", "s3n"), "Use s3://bucket/prefix."),
}
_LACKS_SLASHES = re.compile(r"(s3|https?|hf|gs|az):(?!//)/?\w", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUBS = frozenset({"huggingface.co", "hf.co", "www.huggingface.co"})


def parse_uri(value: str, name: str) -> str:
    """A path, or a URI whose scheme is in small letters, without slashes at its end.

    Raises ConfigurationError, naming `name`, for what no source reads.
    """
    scheme, separator, rest = value.partition("://")
    if not separator:
        if _LACKS_SLASHES.match(value):
            raise ConfigurationError(
                f"{name}: {redact_uri(value)} has a scheme without two slashes.",
                hint="Write s3://bucket/prefix, http://host/path; for a directory of this name, "
                "put ./ in front.",
            )
        return value.rstrip("/") or "/"
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        # Only the scheme is shown: what follows may hold a password, whatever "htps" is.
        raise ConfigurationError(
            f"{name}: the scheme {scheme!r} is not supported.",
            hint=_ELSEWHERE.get(scheme, f"Use {EXAMPLES}."),
        )
    uri = f"{scheme}://{rest}"
    if not SCHEMES[scheme].has_query:
        try:
            SCHEMES[scheme].check(uri)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error.message}", hint=error.hint) from None
    else:
        host, _ = host_and_port(uri, name)
        place = rest.partition("/")[2].partition("?")[0]
        if host in _HUBS and "/resolve/" not in place:
            raise ConfigurationError(
                f"{name}: {host} shows pages about models; it has no bundle.",
                hint=f"Pack the model: `tensorserve pack {_hub_name(place)} DEST`, where DEST is a "
                "directory, s3://, gs:// or az://.",
            )
        if "?" in rest:
            return uri  # a signature may end with a "/"
    return f"{scheme}://{rest.rstrip('/') or '/'}"


def _hub_name(place: str) -> str:
    found = _HUB_NAME.match(place)
    return found[0] if found else "ORGANISATION/MODEL"


def _model_uri(value: str, name: str) -> str:
    """As parse_uri; a path becomes absolute: other processes have other working directories."""
    uri = parse_uri(value, name)
    if "://" in uri or uri.startswith("/"):
        return uri
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return uri
    path = here / uri
    # Not Path.exists: it raises where a name is too long.
    if _HUB_NAME.fullmatch(uri) and not os.path.exists(path):  # noqa: PTH110
        raise ConfigurationError(
            f"{name}={uri}: there is no such directory in {here}, and a model of the Hugging Face "
            "hub is not a bundle.",
            hint=f"If it is one of the hub's, pack it: `tensorserve pack {uri} DEST`, where DEST "
            "is a directory, s3://, gs:// or az://. If it is a directory, give its absolute path.",
        )
    return str(path)


def _adapters_uri(value: str, name: str) -> str:
    """As parse_uri; a path becomes absolute: other processes have other working directories."""
    uri = parse_uri(value, name)
    if "://" in uri or uri.startswith("/"):
        return uri
    try:
        return str(Path.cwd() / uri)
    except OSError:  # it was removed
        return uri


def _port(value: str, name: str) -> int:
    if _WHOLE.fullmatch(value) and 0 < int(value) < 65536:
        return int(value)
    raise ConfigurationError(f"{name}={_short(value)} is not a port.", hint="Use 1 to 65535.")


def _count(low: int, high: int) -> Callable[[str, str], int]:
    def parse(value: str, name: str) -> int:
        if _WHOLE.fullmatch(value) and low <= int(value) <= high:
            return int(value)
        raise ConfigurationError(
            f"{name}={_short(value)} is not a whole number from {low} to {high}.",
            hint=f"For example {name}={max(low, min(high, 16))}.",
        )

    return parse


def _seconds(value: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", value) or not 1 <= float(value) <= 86400:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 1 to 86400.",
            hint=f"For example {name}=300.",
        )
    return float(value)


def _linger(value: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", value) or float(value) > 300:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 0 to 300.",
            hint=f"For example {name}=10.",
        )
    return float(value)


def _deadline(value: str, name: str) -> float:
    if re.fullmatch(r"0{1,6}(\.0{1,9})?", value):
        return 0.0
    try:
        return _seconds(value, name)
    except ConfigurationError:
        raise ConfigurationError(
            f"{name}={_short(value)} is neither 0 nor a number of seconds from 1 to 86400.",
            hint=f"For example {name}=1800; 0 is none.",
        ) from None


_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)


def parse_size(value: str, name: str) -> int:
    """Bytes from "1GiB", "512m" or "1073741824"; K, M, G, T are decimal, Ki, Mi, Gi, Ti binary."""
    match = _SIZE.fullmatch(value)
    if not match or (match[3] and not match[2]):
        raise ConfigurationError(
            f"{name}={_short(value)} is not a size.", hint=f"For example {name}=1GiB."
        )
    letter = match[2].upper()
    factor = 1024 ** ("KMGT".index(letter) + 1) if match[3] else _UNITS[letter]
    return int(float(match[1]) * factor)


def _memory_limit(value: str, name: str) -> int:
    size = parse_size(value, name)
    if size < 64 * 1024**2:
        raise ConfigurationError(
            f"{name}={_short(value)} is less than 64MiB, too little to read a model with.",
            hint=f"For example {name}=1GiB.",
        )
    if size >= 10**18:
        raise ConfigurationError(
            f"{name}={_short(value)} is 1 EB or more: no machine has that much memory.",
            hint=f"For example {name}=1GiB.",
        )
    return size


def _adapters_memory(value: str, name: str) -> int:
    size = parse_size(value, name)
    if size < 1024**2:
        raise ConfigurationError(
            f"{name}={_short(value)} is less than 1MiB, too little for an adapter.",
            hint=f"For example {name}=1GiB.",
        )
    return size


def _choice(*accepted: str) -> Callable[[str, str], str]:
    def parse(value: str, name: str) -> str:
        if value.lower() in accepted:
            return value.lower()
        raise ConfigurationError(
            f"{name}={_short(value)} is not one of {', '.join(accepted)}.",
            hint=f"For example {name}={accepted[0]}.",
        )

    return parse


COMPILING = "compiling"
"""The value of TENSORSERVE_COMPILED that `tensorserve precompile` gives to the engine it starts."""


def _compiled(value: str, name: str) -> str:
    return value if value == COMPILING else _choice("auto", "off", "required")(value, name)


_ADAPTER_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,127}")


def _adapter_names(value: str, name: str) -> tuple[str, ...]:
    patterns = _names(value, name)
    for pattern in patterns:
        if not _ADAPTER_PATTERN.fullmatch(pattern):
            raise ConfigurationError(
                f"{name}: {_short(pattern)} is neither an adapter's name nor a pattern of names.",
                hint="Names have letters, digits, '.', '_' and '-'; '*' stands for any of them: "
                f"{name}=sql,team-a-*.",
            )
    return patterns


def _truth(value: str, name: str) -> bool:
    return _choice("true", "false")(value, name) == "true"


def _sha256(value: str, name: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    raise ConfigurationError(
        f"{name}={value!r} is not a SHA-256.", hint="It has 64 hex digits: `tensorserve verify`."
    )


def _fingerprint(value: str, name: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    raise ConfigurationError(
        f"{name} is not the fingerprint of a key.",  # not shown: it may be the key itself
        hint="It has 64 hex digits: `tensorserve pack --wrap` and `rewrap` print it.",
    )


def _key_uri(value: str, name: str) -> str:
    parse_reference(value, name)
    return value


_MOUNT = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


def _mount(value: str, name: str) -> str:
    if _MOUNT.fullmatch(value.strip("/")):
        return value.strip("/")
    raise ConfigurationError(
        f"{name}={_short(value)} is not the path of an auth method.",
        hint=f"For example {name}=approle.",
    )


def _loopback_url(value: str, name: str) -> str:
    """What is answered there is a key in clear: it may not leave this machine."""
    host, _ = host_and_port(value, name)
    url = value.rstrip("/")
    if host not in {"127.0.0.1", "::1", "localhost"} or not re.fullmatch(r"http://[^/?#@]+", url):
        raise ConfigurationError(
            f"{name}={_short(redact_uri(value))} is not an address of this machine.",
            hint=f"For example {name}={CDH_URL}.",
        )
    return url


def _names(value: str, _name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,\s]+", value) if part)


def _jwt_file(value: str, name: str) -> str:
    return str(_path(value, name))


def _path(value: str, name: str) -> Path:
    if not value.startswith("/"):
        raise ConfigurationError(f"{name}={_short(value)} is not an absolute path.")
    return Path(value)


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where a start keeps its event log and small files: a private directory, best on tmpfs."""
    for base in (environ.get("XDG_RUNTIME_DIR"), "/run", "/tmp"):
        if base and os.access(base, os.W_OK | os.X_OK):
            return Path(base) / ("tensorserve" if base != "/tmp" else f"tensorserve-{os.getuid()}")
    return Path("/tmp") / f"tensorserve-{os.getuid()}"


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "TENSORSERVE_MODEL_URI", "model_uri", _model_uri, None,
        "The model: a bundle's directory, or one `.tensors` file. Required.",
        "path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, `hf://`",
        private=True, shown_default="required",
    ),
    Variable(
        "TENSORSERVE_MODEL_NAME", "model_name", _text, None,
        "The name that clients ask for.", "text", shown_default="last parts of the URI",
    ),
    Variable(
        "TENSORSERVE_KEY", "key", _text, None,
        "The key of an encrypted model.", "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_PASSPHRASE", "passphrase", _text, None,
        "The passphrase of a model sealed with one (Argon2id).", "text",
        secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_KEY_URI", "key_uri", _key_uri, None,
        "The key by reference: who unwraps the one in the manifest (docs/keys.md).",
        "`file:PATH`, `age:PATH`, `vault:MOUNT/KEY`, `vault://HOST/MOUNT/KEY`, `awskms:KEY`, "
        "`gcpkms:NAME`, `azurekeyvault://VAULT/KEY`, `kbs:///REPOSITORY/TYPE/TAG`",
        shown_default="what the manifest names, where it is set up here",
    ),
    Variable(
        "TENSORSERVE_KEY_FINGERPRINT", "key_fingerprint", _fingerprint, None,
        "The only key that is accepted, by its public name, which `pack --wrap` and `rewrap` "
        "print. Needed (or the pin below) where the key is wrapped for a public key (`age:`, "
        "`azurekeyvault:`).",
        "64 hex digits", shown_default="any key",
    ),
    Variable(
        "TENSORSERVE_VAULT_KUBERNETES_ROLE", "vault.kubernetes_role", _text, None,
        "The role to log in to Vault with by the pod's service account, instead of `VAULT_TOKEN`.",
        "text", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_JWT_FILE", "vault.jwt_file", _jwt_file, VaultAccess.jwt_file,
        "The service account's token for it.", "absolute path",
    ),
    Variable(
        "TENSORSERVE_VAULT_ROLE_ID", "vault.role_id", _text, None,
        "The RoleID to log in to Vault with by AppRole, instead of `VAULT_TOKEN`.",
        "text", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_SECRET_ID", "vault.secret_id", _text, None,
        "The SecretID of the AppRole.", "text", secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_AUTH_MOUNT", "vault.auth_mount", _mount, None,
        "Where the method to log in is mounted.", "path",
        shown_default="`kubernetes` or `approle`",
    ),
    Variable(
        "TENSORSERVE_CDH_URL", "cdh_url", _loopback_url, CDH_URL,
        "Where a confidential guest's data hub answers, for `kbs:`.", "http:// of this machine",
    ),
    Variable(
        "TENSORSERVE_HOST", "host", parse_host, "0.0.0.0", "Where the API listens.", "address"
    ),
    Variable("TENSORSERVE_PORT", "port", _port, 8000, "The API's port.", "1–65535"),
    Variable(
        "TENSORSERVE_METRICS_HOST", "metrics_host", parse_host, "0.0.0.0",
        "Where the metrics listen.", "address",
    ),
    Variable(
        "TENSORSERVE_METRICS_PORT", "metrics_port", _port, 9400, "The metrics' port.", "1–65535"
    ),
    Variable(
        "TENSORSERVE_FETCH_CONNECTIONS", "fetch_connections", _count(1, 512), None,
        "How many ranges are read at once.", "1–512", shown_default="automatic",
    ),
    Variable(
        "TENSORSERVE_FETCH_DEADLINE", "fetch_deadline", _seconds, 300.0,
        "How long a range may make no progress, retries included, before the start is given up.",
        "seconds, 1–86400",
        shown_default="300, or half of a shorter `TENSORSERVE_START_DEADLINE`",
    ),
    Variable(
        "TENSORSERVE_HOST_MEMORY_LIMIT", "host_memory_limit", _memory_limit, None,
        "Host memory for weights that are being loaded, for all ranks of the machine together. "
        "Automatic: a quarter of what is available at the start within the container's limit, at "
        "most 1GiB for each rank and 4GiB for what is fetched ahead.",
        "size, at least 64MiB", shown_default="automatic, a quarter of what is available",
    ),
    Variable(
        "TENSORSERVE_PREFETCH", "prefetch", _choice("auto", "off"), "auto",
        "Whether weights behind a network are fetched into memory (still sealed; three eighths of "
        "the limit above, or all beyond 1GiB for each rank) while vLLM imports.",
        "`auto`, `off`",
    ),
    Variable(
        "TENSORSERVE_SHARE_LOAD", "share_load", _choice("auto", "on", "off"), "auto",
        "Whether tensor-parallel ranks of one machine that read one file each fetch and open a "
        "part of it and give it to the others (NCCL on GPUs, gloo on CPUs). `auto`: no, since "
        "it was not run on a GPU yet and brings little on a CPU.",
        "`auto`, `on`, `off`",
    ),
    Variable(
        "TENSORSERVE_IMPORT_ONCE", "import_once", _choice("auto", "off"), "auto",
        "Whether vLLM is imported once, beside the checks, and its processes are forked from that "
        "import. `off`: after the checks, and again in each process.",
        "`auto`, `off`",
    ),
    Variable(
        "TENSORSERVE_VERIFY", "verify", _choice("auto", "hashes", "manifest", "tags"), "auto",
        "How encrypted weights are authenticated. `auto`: an authenticated manifest, else each "
        "tensor's own digest, and both where a signature is needed; `hashes`: the digests always; "
        "`manifest`: such a manifest or no start (of plain weights: one that is pinned); `tags`: "
        "without such a manifest, each chunk's tag alone (whoever can write the bundle can then "
        "exchange tensors). Plain weights have no tags: a pinned bundle's digests are compared "
        "with every value.",
        "`auto`, `hashes`, `manifest`, `tags`",
    ),
    Variable(
        "TENSORSERVE_MANIFEST_SHA256", "manifest_sha256", _sha256, None,
        "The only bundle that is served: the SHA-256 of its `manifest.json`, which `pack`, `sign` "
        "and `verify` print.",
        "64 hex digits", shown_default="any bundle of the key's owner",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_KEY", "signature_key", _text, None,
        "The public half of `pack --sign-key` and `sign --sign-key`, or several of them: a bundle "
        "without a signature (`model.sig`) of one, or whose `manifest.json` is not what was "
        "signed, is refused (65) before a key is asked for (docs/signatures.md).",
        "EC public keys in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_CERTIFICATES", "signature_certificates", _text, None,
        "The same for signers with certificates: those of the authorities above them.",
        "certificates in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_LOADER", "loader", _choice("auto", "reference"), "auto",
        "Who makes tensors of what is read: `auto` is our own loader; `reference` is tensorizer's "
        "own reader over the same sources and checks. It is slower, and tells whether our loader "
        "or the file is at fault.",
        "`auto`, `reference`",
    ),
    Variable(
        "TENSORSERVE_COMPILED", "compiled", _compiled, "auto",
        "Whether the engine takes the compiled code that `tensorserve precompile` put into the "
        "bundle for exactly this engine. `auto`: if it is there; `required`: no start without "
        "it (78). A bundle that is not encrypted has such code only with a key of its own (below).",
        "`auto`, `off`, `required`",
    ),
    Variable(
        "TENSORSERVE_COMPILED_KEY", "compiled_key", _text, None,
        "The key of sealed compiled code.", "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="derived from the model's key",
    ),
    Variable(
        "TENSORSERVE_COMPILED_SIGNATURE_KEY", "compiled_signature_key", _text, None,
        "The public half of `precompile --sign-key`: compiled code without its signature is "
        "refused (65). A server that was broken into can seal code, but cannot sign it.",
        "an Ed25519 public key in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_URI", "adapters_uri", _adapters_uri, None,
        "Where LoRA adapters are found while serving: a request for the model `NAME` is answered "
        "with the adapter that `tensorserve pack-adapter` put there under `NAME/` "
        "(docs/adapters.md).",
        "path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, `hf://`",
        private=True, shown_default="none: only the adapters in the bundle are served",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_KEY", "adapters_key", _text, None,
        "The key of those adapters, if it is not the model's. Where there is a key, plain adapters "
        "are refused.",
        "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="the model's key or passphrase",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_ALLOW", "adapters_allow", _adapter_names, (),
        "Names of adapters that may be served; `*` stands for any characters. All others are "
        "refused before the store is asked.",
        "names, comma-separated", shown_default="all names",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_TTL", "adapters_ttl", _seconds, 300.0,
        "After how long the store is asked whether an adapter is still there and the same. One "
        "that nobody has used for so long is let go.",
        "seconds, 1–86400", shown_default="300",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_COUNT", "adapters_count", _count(1, 4096), 16,
        "How many of those adapters are held at once; of more, the one that was used longest ago "
        "gives way. Also `--max-cpu-loras`, if that is not set.",
        "1–4096",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_MEMORY", "adapters_memory", _adapters_memory, 1024**3,
        "Host memory for those adapters. Each of vLLM's workers has its own copy besides.",
        "size, at least 1MiB", shown_default="1GiB",
    ),
    Variable(
        "TENSORSERVE_ALLOWED_HOSTS", "allowed_hosts", _names, (),
        "Link-local or metadata hosts that a URI may name all the same.", "names, comma-separated",
        shown_default="none",
    ),
    Variable(
        "TENSORSERVE_S3_ADDRESSING_STYLE", "s3.addressing_style",
        _choice("virtual", "path", "auto"), None,
        "Where the bucket stands in an S3 URL. `virtual`: in the host name, as CoreWeave's, "
        "Alibaba's and Tencent's stores want it; `path`: in the path; `auto`: in the path with an "
        "endpoint of one's own, else in the host name.",
        "`virtual`, `path`, `auto`", shown_default="`addressing_style` of the AWS configuration",
    ),
    Variable(
        "TENSORSERVE_S3_UNSIGNED", "s3.unsigned", _truth, False,
        "Whether S3 is asked without credentials, as `aws --no-sign-request` does: for public "
        "buckets.",
        "`true`, `false`", shown_default="`false`",
    ),
    Variable(
        "TENSORSERVE_S3_REQUEST_PAYER", "s3.request_payer", _choice("requester"), None,
        "`requester`: the account of the credentials pays for reading a requester-pays bucket.",
        "`requester`", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_GCS_UNSIGNED", "gcs.unsigned", _truth, False,
        "Whether Google Cloud Storage is asked without credentials: for public buckets.",
        "`true`, `false`", shown_default="`false`",
    ),
    Variable(
        "TENSORSERVE_ENGINE_RESTARTS", "engine_restarts", _count(0, 100), 0,
        "How often a crashed engine is started again before the container ends.", "0–100",
    ),
    Variable(
        "TENSORSERVE_START_DEADLINE", "start_deadline", _deadline, None,
        "How long a start may advance in nothing (phases, bytes, what vLLM prints) before it is "
        "ended; 0: for ever. More than `TENSORSERVE_FETCH_DEADLINE`, within which a source may be "
        "away.",
        "seconds, 1–86400, or 0", shown_default="1800, or twice `TENSORSERVE_FETCH_DEADLINE`",
    ),
    Variable(
        "TENSORSERVE_FAILURE_LINGER", "failure_linger", _linger, 10.0,
        "After a failure, how long the metrics wait for one more scrape before the container ends.",
        "seconds, 0–300",
    ),
    Variable(
        "TENSORSERVE_STATE_DIR", "state_dir", _path, None,
        "Event log and the model's small files (configuration, tokenizer).", "absolute path",
        shown_default="`/run/tensorserve`, else a private directory in `/tmp`",
    ),
    Variable(
        "TENSORSERVE_PASS_ENV", "pass_env", _names, (),
        "Further variables that vLLM may see; by default it gets an allow-list.",
        "names, comma-separated", shown_default="none",
    ),
)  # fmt: skip
BY_NAME = {variable.name: variable for variable in VARIABLES}
