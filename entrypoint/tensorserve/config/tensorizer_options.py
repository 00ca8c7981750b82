"""Which settings do the options of vLLM's own Tensorizer loader stand for?

For `vllm serve DIR --load-format tensorizer --model-loader-extra-config JSON` and `LLM(...)` as on
vLLM's page. Each option is mapped to a setting or refused with the reason; none is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError, UsageError

# What vLLM adds by itself (engine/arg_utils.py, create_load_config).
_VLLMS_OWN = "tensorizer_config"
_MOST_THREADS = 1024
# The option in which `llm_kwargs` hands over a start.
REFERENCE = "tensorserve"
_DIRECTORY, _URI = "tensorizer_dir", "tensorizer_uri"
_MODEL_URI = "TENSORSERVE_MODEL_URI"

Mapped = dict[str, str]


def environment_for(extra: Mapping[str, Any]) -> Mapped:
    """The variables that say what `model_loader_extra_config` says.

    Raises ConfigurationError for an option that is unknown, has no meaning here, or is of the
    wrong type.
    """
    own = extra.get(_VLLMS_OWN) or {}
    options = {name: value for name, value in own.items() if not name.startswith("_")}
    if _URI in extra:
        # vLLM's own is the model's directory: meant unless the user gives an address.
        options.pop(_DIRECTORY, None)
    options |= {name: value for name, value in extra.items() if name != _VLLMS_OWN}
    mapped: Mapped = {}
    # As in vLLM: what stands in an inner object wins.
    for name, value in sorted(options.items(), key=lambda option: isinstance(option[1], dict)):
        if value is None:
            continue
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            raise ConfigurationError(
                f"model_loader_extra_config: there is no option {name!r}.",
                hint=f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(OPTIONS)}.",
            )
        mapped |= OPTIONS[name](name, value)
    if options.get(_URI):
        # As in vLLM: the address wins over the directory.
        mapped[_MODEL_URI] = _text(_URI, options[_URI])
    if _MODEL_URI not in mapped:
        raise ConfigurationError("model_loader_extra_config names no tensorizer_uri.")
    return mapped


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"model_loader_extra_config: {name!r} is not a text.")
    return value


def _to(variable: str) -> Callable[[str, Any], Mapped]:
    return lambda name, value: {variable: _text(name, value)}


def _connections(name: str, value: object) -> Mapped:
    if type(value) is not int or value < 1:
        raise ConfigurationError(
            f"model_loader_extra_config: {name!r} is {value!r}, not a number above 0.",
            hint="Leave it out: the loader finds how many connections help.",
        )
    return {"TENSORSERVE_FETCH_CONNECTIONS": str(value)}


_WORDS: dict[str, object] = {"True": True, "true": True, "False": False, "false": False}


def _meant(value: object) -> object:
    """`value`; "True" and "false" as words are booleans, as in earlier revisions of vLLM's page."""
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _flag(name: str, value: object) -> bool:
    value = _meant(value)
    if not isinstance(value, bool):
        raise ConfigurationError(f"model_loader_extra_config: {name!r} is not true or false.")
    return value


def _verify(name: str, value: object) -> Mapped:
    return {"TENSORSERVE_VERIFY": "hashes"} if _flag(name, value) else {}


def _found_by_itself(name: str, value: object) -> Mapped:
    """Accepted and ignored: read from the file, or decided by the memory limit."""
    _flag(name, value)
    return {}


def _refused(reason: str) -> Callable[[str, Any], Mapped]:
    def refuse(name: str, value: object) -> Mapped:
        if _meant(value) in ({}, False):
            return {}  # the same as not given
        raise ConfigurationError(
            f"model_loader_extra_config: {name!r} cannot be given: {reason}", hint="Leave it out."
        )

    return refuse


def _nested(inner: Mapping[str, Callable[[str, Any], Mapped]]) -> Callable[[str, Any], Mapped]:
    def each(name: str, value: object) -> Mapped:
        if not isinstance(value, dict):
            raise ConfigurationError(f"model_loader_extra_config: {name!r} is not an object.")
        mapped: Mapped = {}
        for key, content in value.items():
            if key not in inner:
                raise ConfigurationError(
                    f"model_loader_extra_config: {name!r} has {key!r}, which has no meaning here.",
                    hint=f"It may have {', '.join(inner)}.",
                )
            if content is not None:
                mapped |= inner[key](f"{name}.{key}", content)
        return mapped

    return each


_S3 = {
    "s3_access_key_id": _to("AWS_ACCESS_KEY_ID"),
    "s3_secret_access_key": _to("AWS_SECRET_ACCESS_KEY"),
    "s3_endpoint": _to("AWS_ENDPOINT_URL_S3"),
}
_TRANSPORT = "how an address is read is this loader's own (see docs/configuration.md)."
_DEVICE = "vLLM decides where tensors go and what they are."
_ALL = "vLLM needs all tensors of a model, each once."
STREAM: Mapping[str, Callable[[str, Any], Mapped]] = {
    **_S3,
    "s3_region_name": _to("AWS_REGION"),
    "force_http": _refused("give AWS_ENDPOINT_URL_S3 with http:// instead."),
    "s3_config_path": _refused("name the file in AWS_SHARED_CREDENTIALS_FILE."),
    "certificate_handling": _refused("name the CA in AWS_CA_BUNDLE or SSL_CERT_FILE."),
    **dict.fromkeys(
        ("mode", "buffer_size", "s3_signature_version", "begin", "end"),
        _refused(_TRANSPORT),
    ),
}
"""Options of tensorizer's open_stream."""
DESERIALIZATION: Mapping[str, Callable[[str, Any], Mapped]] = {
    "num_readers": _connections,
    "verify_hash": _verify,
    "plaid_mode": _found_by_itself,
    "plaid_mode_buffers": _refused("memory is TENSORSERVE_HOST_MEMORY_LIMIT's."),
    "lazy_load": _refused(_ALL),
    "filter_func": _refused(_ALL),
    "device": _refused(_DEVICE),
    "dtype": _refused(_DEVICE),
    "encryption": _refused("name the key's file in encryption_keyfile."),
}
"""Options of its TensorDeserializer."""
OPTIONS: dict[str, Callable[[str, Any], Mapped]] = {
    _URI: _to(_MODEL_URI),
    _DIRECTORY: _to(_MODEL_URI),
    "encryption_keyfile": _to("TENSORSERVE_KEY_FILE"),
    "verify_hash": _verify,
    "num_readers": _connections,
    **_S3,
    "vllm_tensorized": _found_by_itself,
    "stream_kwargs": _nested(STREAM),
    "deserialization_kwargs": _nested(DESERIALIZATION),
    "serialization_kwargs": _refused("it is for writing (`tensorserve pack`)."),
    "lora_dir": _refused("adapters are in the bundle (`tensorserve pack --lora`)."),
    "device": _refused(_DEVICE),
    "dtype": _refused(_DEVICE),
    "mode": _refused("vLLM decides it."),
    "model_class": _refused("vLLM finds it in config.json."),
    "hf_config": _refused("vLLM finds it in config.json."),
}
"""Each option of vLLM's TensorizerConfig → what it means in variables."""


def encrypting_threads(text: str) -> int | None:
    """What `--serialization-kwargs` (JSON, for tensorizer's TensorSerializer) means to `pack`.

    Raises UsageError for what has no meaning here.
    """
    try:
        options = read_json(text)
        if not isinstance(options, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise UsageError(f"--serialization-kwargs is not a JSON object: {error}.") from error
    threads = options.pop("limit_cpu_concurrency", None)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
        raise UsageError(
            f"limit_cpu_concurrency is {threads!r}, not a number above 0, up to {_MOST_THREADS}."
        )
    if options.pop("compress_tensors", False):
        raise UsageError(
            "compress_tensors: tensorizer itself writes tensors as they are.", hint="Leave it out."
        )
    if "encryption" in options:
        raise UsageError("encryption is no option in JSON.", hint="Use --encrypt --key-file PATH.")
    if options:
        raise UsageError(
            f"--serialization-kwargs has {next(iter(options))!r}, which tensorizer does not know.",
            hint="It may have limit_cpu_concurrency.",
        )
    return threads
