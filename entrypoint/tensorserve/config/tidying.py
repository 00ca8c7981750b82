"""Which values do the variables have without accidental white space and quotes?

Stripped are carriage returns of files with Windows line ends, newlines after secrets, and the
quotes that `docker run --env-file` keeps. Empty values, as of Compose's `NAME: ${NAME:-}`, count as
unset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

PREFIXES = ("TENSORSERVE_", "AWS_", "S3_", "AZURE_", "GOOGLE_", "VAULT_", "BAO_")
_INTERNAL = "TENSORSERVE_INTERNAL_"
# Read here, or by libraries that fail for an empty value.
_NAMES = frozenset(
    """VLLM_API_KEY VLLM_API_KEY_FILE HF_TOKEN HF_TOKEN_FILE STORAGE_EMULATOR_HOST CLOUDSDK_CONFIG
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
    HF_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ENDPOINT HF_TOKEN_PATH HF_ASSETS_CACHE
    HF_XET_CACHE TRANSFORMERS_CACHE XDG_CACHE_HOME XDG_CONFIG_HOME XDG_RUNTIME_DIR""".split()
)
# An empty proxy variable has a meaning: `https_proxy=` switches HTTPS_PROXY off.
_PROXIES = frozenset("http_proxy https_proxy all_proxy no_proxy".split())
# May begin and end with any character; only a line end after it is removed, as in a file.
_PASSPHRASE = "TENSORSERVE_PASSPHRASE"
_TEMPLATE = "TENSORSERVE_VLLM_CHAT_TEMPLATE"
# Not white space to Python: byte order mark, zero-width space.
_INVISIBLE = "\ufeff\u200b"
_QUOTES = ('"', "'")
_HOME_NAMES = frozenset(
    """TENSORSERVE_MODEL_URI TENSORSERVE_STATE_DIR AWS_CA_BUNDLE
    GOOGLE_APPLICATION_CREDENTIALS""".split()
)


def tidied(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with the values of PREFIXES stripped and unquoted.

    Empty ones are left out. The same holds for paths that libraries read (`_NAMES`). In paths of
    TENSORSERVE_* "~" is replaced by HOME. Idempotent.
    """
    result = {}
    for name, text in environ.items():
        if name.lower() in _PROXIES:
            result[name] = stripped(text)
            continue
        value = _tidied(name, text, environ)
        if value or not _is_ours(name):
            result[name] = value
    return result


def tidy_process(environ: MutableMapping[str, str] | None = None) -> None:
    """`tidied` in place, for variables of this process that botocore and other libraries read.

    TENSORSERVE_* are left alone: Settings reads them and reports what is wrong with them.
    """
    environ = os.environ if environ is None else environ
    clean = tidied(environ)
    for name in [name for name in environ if not name.startswith("TENSORSERVE_")]:
        if name not in clean:
            del environ[name]
        elif clean[name] != environ[name]:
            environ[name] = clean[name]


def stripped(text: str) -> str:
    """`text` without white space, byte order marks and zero-width spaces around it."""
    while True:
        shorter = text.strip().strip(_INVISIBLE)
        if shorter == text:
            return text
        text = shorter


def unquoted(text: str) -> str:
    """`text` without quotes around all of it, as Compose reads such a line.

    A value with the same quote inside is a list of words or JSON, and is kept.
    """
    while len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0]:
        inside = text[1:-1]
        if text[0] in inside:
            return text
        text = stripped(inside)
    return text


def has_controls(text: str, allowed: str = "") -> bool:
    """Whether a character of `text` cannot be printed: a control, or a byte that is not UTF-8."""
    return any(
        (ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF) and c not in allowed
        for c in text
    )


def _is_ours(name: str) -> bool:
    return (name.startswith(PREFIXES) and not name.startswith(_INTERNAL)) or name in _NAMES


def _tidied(name: str, text: str, environ: Mapping[str, str]) -> str:
    if name == _PASSPHRASE:
        return text.rstrip("\r\n")
    if not _is_ours(name):
        return text
    value = unquoted(stripped(text))
    if name == _TEMPLATE and "{" in value:
        return text  # an inline template: its white space is part of each prompt
    is_path = name in _HOME_NAMES or (name.endswith("_FILE") and name.startswith(PREFIXES))
    if is_path and (value == "~" or value.startswith("~/")):
        # As a shell does.
        home = unquoted(stripped(environ.get("HOME", "")))
        return (home or os.path.expanduser("~")) + value[1:]  # noqa: PTH111
    return value
