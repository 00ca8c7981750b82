"""Which variables there are: the one list of the public interface, and how each is read.

docs/configuration.md and the README's table are made from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorserve.errors import ConfigurationError
from tensorserve.sources.addresses import host_and_port
from tensorserve.sources.s3_uri import split_s3


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
    """What was given, for a message: as much of it as a terminal's line takes."""
    return repr(value if len(value) <= 80 else f"{value[:80]}…")


def _text(value: str, _name: str) -> str:
    return value


def _uri(value: str, name: str) -> str:
    scheme, separator, rest = value.partition("://")
    if not separator:
        return value.rstrip("/") or "/"
    scheme = scheme.lower()
    if scheme not in {"file", "http", "https", "s3"}:
        raise ConfigurationError(
            f"{name}: the scheme {scheme!r} is not supported.",
            hint="Use a path, file://, http://, https:// or s3://bucket/prefix.",
        )
    uri = f"{scheme}://{rest}"
    if scheme == "s3":
        try:
            split_s3(uri)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error.message}", hint=error.hint) from None
    if scheme in {"http", "https"}:
        host_and_port(uri, name)
        if "?" in rest:
            return uri  # a signature may end with a "/"
    return f"{scheme}://{rest.rstrip('/') or '/'}"


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
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= 86400:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 1 to 86400.",
            hint=f"For example {name}=300.",
        )
    return seconds


def _linger(value: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", value) or float(value) > 300:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 0 to 300.",
            hint=f"For example {name}=10.",
        )
    return float(value)


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
    return size


def _choice(*accepted: str) -> Callable[[str, str], str]:
    def parse(value: str, name: str) -> str:
        if value in accepted:
            return value
        raise ConfigurationError(
            f"{name}={_short(value)} is not one of {', '.join(accepted)}.",
            hint=f"For example {name}={accepted[0]}.",
        )

    return parse


def _sha256(value: str, name: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    raise ConfigurationError(
        f"{name}={value!r} is not a SHA-256.", hint="It has 64 hex digits: `tensorserve verify`."
    )


def _names(value: str, _name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,\s]+", value) if part)


def _path(value: str, name: str) -> Path:
    if not value.startswith("/"):
        raise ConfigurationError(f"{name}={_short(value)} is not an absolute path.")
    return Path(value)


def default_state_dir() -> Path:
    """Where a start keeps its event log and small files: a private directory, best on tmpfs."""
    for base in (os.environ.get("XDG_RUNTIME_DIR"), "/run", "/tmp"):
        if base and os.access(base, os.W_OK | os.X_OK):
            return Path(base) / ("tensorserve" if base != "/tmp" else f"tensorserve-{os.getuid()}")
    return Path("/tmp") / f"tensorserve-{os.getuid()}"


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "TENSORSERVE_MODEL_URI", "model_uri", _uri, None,
        "The model: a bundle's directory, or one `.tensors` file. Required.",
        "path, `file://`, `http(s)://`, `s3://`", private=True, shown_default="required",
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
    Variable("TENSORSERVE_HOST", "host", _text, "0.0.0.0", "Where the API listens.", "address"),
    Variable("TENSORSERVE_PORT", "port", _port, 8000, "The API's port.", "1–65535"),
    Variable(
        "TENSORSERVE_METRICS_HOST", "metrics_host", _text, "0.0.0.0",
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
    ),
    Variable(
        "TENSORSERVE_HOST_MEMORY_LIMIT", "host_memory_limit", _memory_limit, None,
        "Host memory for data on its way to the device, for all ranks of the machine together. "
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
        "TENSORSERVE_VERIFY", "verify", _choice("auto", "hashes", "manifest", "tags"), "auto",
        "What vouches for encrypted weights. `auto`: an authenticated manifest, else each tensor's "
        "own digest; `hashes`: the digests always; `manifest`: such a manifest or no start (of "
        "plain weights: one that is pinned); `tags`: without such a manifest, each chunk's tag "
        "alone (whoever can write the bundle can then exchange tensors). Plain weights have no "
        "tags: a pinned bundle's digests are compared with every value.",
        "`auto`, `hashes`, `manifest`, `tags`",
    ),
    Variable(
        "TENSORSERVE_MANIFEST_SHA256", "manifest_sha256", _sha256, None,
        "The only bundle that is served: the SHA-256 of its `manifest.json`, which `pack`, `sign` "
        "and `verify` print.",
        "64 hex digits", shown_default="any bundle of the key's owner",
    ),
    Variable(
        "TENSORSERVE_LOADER", "loader", _choice("auto", "reference"), "auto",
        "Who makes tensors of what is read: `auto` is our own loader; `reference` is tensorizer's "
        "own reader over the same sources and checks. It is slower, and tells whether our loader "
        "or the file is at fault.",
        "`auto`, `reference`",
    ),
    Variable(
        "TENSORSERVE_ALLOWED_HOSTS", "allowed_hosts", _names, (),
        "Link-local or metadata hosts that a URI may name all the same.", "names, comma-separated",
        shown_default="none",
    ),
    Variable(
        "TENSORSERVE_ENGINE_RESTARTS", "engine_restarts", _count(0, 100), 0,
        "How often a crashed engine is started again before the container ends.", "0–100",
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
