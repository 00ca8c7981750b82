"""Which model drafts in speculative decoding, and is it where vLLM will look for it?

Read from the flags of `vllm serve` as vLLM does (config/speculative.py, 0.32.0).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tensorserve.config.vllm_arguments import Argument, Arguments
from tensorserve.errors import ConfigurationError

# Methods without a draft model: from the text itself, or with a class of the user's own.
_WITHOUT_MODEL = frozenset(
    {"ngram", "[ngram]", "ngram_gpu", "suffix", "extract_hidden_states", "custom_class"}
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_MISTRALS = "params.json"
# The "model" that means the draft which was packed with the bundle. No name of the hub has a colon.
PACKED = "bundle:draft"
_CONFIG = "speculative-config"
# Arguments that set one key of it.
_MODEL = "spec-model"
_KEYS = {"spec-method": "method", _MODEL: "model", "spec-tokens": "num_speculative_tokens"}


@dataclass(frozen=True)
class Draft:
    """The draft that was asked for."""

    method: str | None
    """None: vLLM derives it from the model."""
    model: str | None
    """A directory, a name of the Hugging Face hub, or PACKED; None: it is in the served model
    itself."""

    @property
    def packed(self) -> bool:
        """Whether it is the one that was packed with the bundle."""
        return self.model == PACKED


def draft_of(arguments: Arguments) -> Draft | None:
    """The draft that `vllm serve` is told to use; None where it drafts without a model.

    Raises ConfigurationError for a --speculative-config that vLLM could not read.
    """
    options = _options(arguments)
    for name, key in _KEYS.items():
        if (value := arguments.value(name)) is not None:
            options[key] = value
    return draft_from(options)


def draft_from(options: Mapping[str, Any]) -> Draft | None:
    """The draft of a --speculative-config that is read already, as `draft_of` gives it.

    Where vLLM needs a model and none is named, it would end: there it is the packed one.
    """
    if not options:
        return None
    method, model = (
        value if isinstance(value := options.get(name), str) and value else None
        for name in ("method", "model")
    )
    if method in _WITHOUT_MODEL or model in _WITHOUT_MODEL:
        return None
    if method is None and model is not None and _is_class(model):
        return None
    if model is None and not is_in_the_model(method):
        model = PACKED
    return Draft(method, model)


def is_in_the_model(method: str | None) -> bool:
    """Whether vLLM looks for what `method` drafts with in the served model, unless it is told
    another: MTP in all its names, and DSpark."""
    return method is not None and (method == "dspark" or method.endswith("mtp"))


def with_draft(arguments: Arguments, directory: str) -> Arguments:
    """`arguments`, which ask for the packed draft, with that draft's `directory` as the model.

    It is named once: vLLM refuses a model that is named twice.
    """
    options = arguments.options(_CONFIG) or {}
    if "model" in options:
        text = json.dumps(options | {"model": directory})
        return arguments.without(_CONFIG).adding(Argument(_CONFIG, (text,)))
    return arguments.without(_MODEL).adding(Argument(_MODEL, (directory,)))


def check_draft(draft: Draft, model_uri: str, environ: Mapping[str, str]) -> tuple[str, int]:
    """(where the draft is, its bytes beside the bundle's), as far as it can be known without vLLM.

    Raises ConfigurationError where it is not there.
    """
    if draft.model is None:
        return "in the served model", 0
    if "://" in draft.model:
        raise ConfigurationError(
            f"The draft model is given as an address ({draft.model.partition('://')[0]}://…); vLLM "
            "takes a directory.",
            hint='Mount it, and give its path as "model" of --speculative-config.',
        )
    path = Path(draft.model)
    if os.path.abspath(path) == local_bundle(model_uri):  # noqa: PTH100 - as vLLM sees it
        return "in the bundle", 0
    if path.is_dir():
        return str(path), _check_directory(path)
    if path.exists():
        return str(path), path.stat().st_size  # a single file: vLLM knows which it takes
    named = draft.model.removeprefix("./")
    if path.is_absolute() or named.startswith("..") or named.count("/") > 1:
        raise ConfigurationError(
            f"The draft model {draft.model} does not exist.",
            hint='Is the volume mounted? It is the "model" of --speculative-config.',
        )
    _check_cached(draft.model, environ)
    return draft.model, 0


def local_bundle(model_uri: str) -> str | None:
    """The directory of a bundle on a disk, as an absolute path; None where it is elsewhere."""
    if model_uri.startswith("file://"):
        # Not urlsplit: "?", "#" and "[" are ordinary characters in a file's name.
        model_uri = unquote(model_uri.removeprefix("file://").removeprefix("localhost"))
    if "://" in model_uri:
        return None
    directory = Path(model_uri)
    if directory.suffix == ".tensors":
        directory = directory.parent
    return os.path.abspath(directory)  # noqa: PTH100 - no link is followed, as vLLM does not


def _options(arguments: Arguments) -> dict[str, Any]:
    """The keys of --speculative-config; not empty where it is given, since vLLM accepts "{}"."""
    try:
        options = arguments.options(_CONFIG)
    except ConfigurationError as error:
        raise ConfigurationError(
            error.message,
            hint='For example {"method": "draft_model", "model": "/models/draft", '
            '"num_speculative_tokens": 3}.',
        ) from error
    if options is None:
        return {}
    return {name.replace("-", "_"): value for name, value in options.items()} or {"": ""}


def _is_class(model: str) -> bool:
    """Whether it reads "package.Class", which vLLM imports."""
    parts = model.split(".")
    return "/" not in model and len(parts) > 1 and all(part.isidentifier() for part in parts)


def _check_directory(directory: Path) -> int:
    """Bytes of its weights."""
    if not any((directory / name).exists() for name in ("config.json", _MISTRALS)):
        raise ConfigurationError(
            f"The draft model {directory} has no config.json.",
            hint='"model" of --speculative-config is a Hugging Face directory.',
        )
    packed = any(directory.glob("*.tensors"))
    for pattern in _WEIGHTS if not packed else ():  # a bundle's *.safetensors are headers alone
        if files := list(directory.glob(pattern)):
            return sum(file.stat().st_size for file in files if file.exists())
    raise ConfigurationError(
        f"The draft model {directory} has no weights (*.safetensors)."
        + (" It is a bundle; a draft is read by vLLM itself, which takes none." if packed else ""),
        hint='"model" of --speculative-config is a Hugging Face directory. Without "model" the '
        "draft that was packed with the bundle is served (`tensorserve pack --draft DIR`).",
    )


def _check_cached(name: str, environ: Mapping[str, str]) -> None:
    if environ.get("HF_HUB_OFFLINE", "").lower() not in {"1", "true", "yes", "on"}:
        return  # vLLM asks the hub
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError

    cache = environ.get("HF_HUB_CACHE") or HF_HUB_CACHE
    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=cache)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ConfigurationError(
            f"The draft model {name!r} is no directory here, and is not in the hub's cache "
            f"({cache}).",
            hint="Nothing is fetched from the hub while serving (HF_HUB_OFFLINE=1): mount the "
            'model, and give its path as "model" of --speculative-config.',
        )
