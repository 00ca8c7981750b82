"""How is a variable's value read?

A parser takes (the value, the variable's name) and raises ConfigurationError, which names the
variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri
from tensorserve.sources.schemes import EXAMPLES, SCHEMES
from tensorserve.sources.ssrf_guard import host_and_port
from tensorserve.wrapping.base import CDH_URL
from tensorserve.wrapping.providers import parse_reference

PREFIX = "TENSORSERVE_"
COMPILING = "compiling"
"""The value of TENSORSERVE_COMPILED that `tensorserve precompile` gives to the engine it starts."""


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Few enough digits for int(), which refuses more than 4,300 in its own words.
_WHOLE = re.compile(r"[0-9]{1,18}")


def _short(value: str) -> str:
    """`value` for a message, cut to 80 characters."""
    return repr(value if len(value) <= 80 else f"{value[:80]}…")


def text(value: str, _name: str) -> str:
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


def model_uri(value: str, name: str) -> str:
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


def adapters_uri(value: str, name: str) -> str:
    """As parse_uri; a path becomes absolute: other processes have other working directories."""
    uri = parse_uri(value, name)
    if "://" in uri or uri.startswith("/"):
        return uri
    try:
        return str(Path.cwd() / uri)
    except OSError:  # it was removed
        return uri


def port(value: str, name: str) -> int:
    if _WHOLE.fullmatch(value) and 0 < int(value) < 65536:
        return int(value)
    raise ConfigurationError(f"{name}={_short(value)} is not a port.", hint="Use 1 to 65535.")


def count(low: int, high: int) -> Callable[[str, str], int]:
    def parse(value: str, name: str) -> int:
        if _WHOLE.fullmatch(value) and low <= int(value) <= high:
            return int(value)
        raise ConfigurationError(
            f"{name}={_short(value)} is not a whole number from {low} to {high}.",
            hint=f"For example {name}={max(low, min(high, 16))}.",
        )

    return parse


def seconds(value: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", value) or not 1 <= float(value) <= 86400:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 1 to 86400.",
            hint=f"For example {name}=300.",
        )
    return float(value)


def linger(value: str, name: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", value) or float(value) > 300:
        raise ConfigurationError(
            f"{name}={_short(value)} is not a number of seconds from 0 to 300.",
            hint=f"For example {name}=10.",
        )
    return float(value)


def deadline(value: str, name: str) -> float:
    if re.fullmatch(r"0{1,6}(\.0{1,9})?", value):
        return 0.0
    try:
        return seconds(value, name)
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


def memory_limit(value: str, name: str) -> int:
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


def adapters_memory(value: str, name: str) -> int:
    size = parse_size(value, name)
    if size < 1024**2:
        raise ConfigurationError(
            f"{name}={_short(value)} is less than 1MiB, too little for an adapter.",
            hint=f"For example {name}=1GiB.",
        )
    return size


def choice(*accepted: str) -> Callable[[str, str], str]:
    def parse(value: str, name: str) -> str:
        if value.lower() in accepted:
            return value.lower()
        raise ConfigurationError(
            f"{name}={_short(value)} is not one of {', '.join(accepted)}.",
            hint=f"For example {name}={accepted[0]}.",
        )

    return parse


def compiled(value: str, name: str) -> str:
    return value if value == COMPILING else choice("auto", "off", "required")(value, name)


_ADAPTER_PATTERN = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._*-]{0,127}")


def adapter_names(value: str, name: str) -> tuple[str, ...]:
    patterns = names(value, name)
    for pattern in patterns:
        if not _ADAPTER_PATTERN.fullmatch(pattern):
            raise ConfigurationError(
                f"{name}: {_short(pattern)} is neither an adapter's name nor a pattern of names.",
                hint="Names have letters, digits, '.', '_' and '-'; '*' stands for any of them: "
                f"{name}=sql,team-a-*.",
            )
    return patterns


def truth(value: str, name: str) -> bool:
    return choice("true", "false")(value, name) == "true"


def sha256(value: str, name: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    raise ConfigurationError(
        f"{name}={value!r} is not a SHA-256.", hint="It has 64 hex digits: `tensorserve verify`."
    )


def fingerprint(value: str, name: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", value):
        return value.lower()
    raise ConfigurationError(
        f"{name} is not the fingerprint of a key.",  # not shown: it may be the key itself
        hint="It has 64 hex digits: `tensorserve pack --wrap` and `rewrap` print it.",
    )


def key_uri(value: str, name: str) -> str:
    parse_reference(value, name)
    return value


_MOUNT = re.compile(r"(?!.*\.\.)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


def mount(value: str, name: str) -> str:
    if _MOUNT.fullmatch(value.strip("/")):
        return value.strip("/")
    raise ConfigurationError(
        f"{name}={_short(value)} is not the path of an auth method.",
        hint=f"For example {name}=approle.",
    )


def loopback_url(value: str, name: str) -> str:
    """What is answered there is a key in clear: it may not leave this machine."""
    host, _ = host_and_port(value, name)
    url = value.rstrip("/")
    if host not in {"127.0.0.1", "::1", "localhost"} or not re.fullmatch(r"http://[^/?#@]+", url):
        raise ConfigurationError(
            f"{name}={_short(redact_uri(value))} is not an address of this machine.",
            hint=f"For example {name}={CDH_URL}.",
        )
    return url


def names(value: str, _name: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[,\s]+", value) if part)


def hosts(value: str, name: str) -> tuple[str, ...]:
    return tuple(parse_host(word, name) for word in names(value, name))


def variable_names(value: str, name: str) -> tuple[str, ...]:
    found = names(value, name)
    for word in found:
        if not _VARIABLE.fullmatch(word):
            raise ConfigurationError(
                f"{name}: {_short(word)} is not the name of a variable.",
                hint=f"Names alone, not values: {name}=LMCACHE_CONFIG_FILE,OTEL_SERVICE_NAME.",
            )
        if word.startswith(PREFIX):
            raise ConfigurationError(
                f"{name}: {_short(word)} is tensorserve's own, and vLLM does not read it.",
                hint=f"Leave it out. Flags of vLLM are {PREFIX}VLLM_<FLAG>.",
            )
    return found


def jwt_file(value: str, name: str) -> str:
    return str(path(value, name))


def path(value: str, name: str) -> Path:
    if not value.startswith("/"):
        raise ConfigurationError(f"{name}={_short(value)} is not an absolute path.")
    return Path(value)
