"""Which model drafts for the served one (speculative decoding), and is it where vLLM will look?

From the flags of `vllm serve`; what they mean stands in vLLM's config/speculative.py (0.32.0).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError
from tensorserve.ranks import flag_value

# What drafts without a model, from the text or with a class of the user's own.
_WITHOUT_MODEL = frozenset(
    {"ngram", "[ngram]", "ngram_gpu", "suffix", "extract_hidden_states", "custom_class"}
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_MISTRALS = "params.json"


@dataclass(frozen=True)
class Draft:
    """What was asked for."""

    method: str | None
    """None: vLLM finds it out from the model."""
    model: str | None
    """A directory, or a name of the Hugging Face hub; None: it is in the served model itself."""


def draft_of(argv: tuple[str, ...]) -> Draft | None:
    """The draft that `vllm serve` with `argv` is told to use; None where it drafts without a model.

    Raises ConfigurationError for a --speculative-config that vLLM could not read.
    """
    text = flag_value(argv, "--speculative-config", "-sc")
    options = {} if text is None else _options(text)
    method = flag_value(argv, "--speculative-config.method", "--spec-method")
    model = flag_value(argv, "--speculative-config.model", "--spec-model")
    if not options and method is None and model is None:
        return None
    draft = Draft(method or options.get("method"), model or options.get("model"))
    if draft.method in _WITHOUT_MODEL or draft.model in _WITHOUT_MODEL:
        return None
    if draft.method is None and draft.model is not None and _is_class(draft.model):
        return None
    return draft


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


def _options(text: str) -> dict[str, str]:
    try:
        options = read_json(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--speculative-config is no JSON: {error}.",
            hint='For example {"method": "draft_model", "model": "/models/draft", '
            '"num_speculative_tokens": 3}.',
        ) from error
    if not isinstance(options, dict):
        raise ConfigurationError("--speculative-config is no JSON object.")
    return {
        name.replace("-", "_"): value for name, value in options.items() if isinstance(value, str)
    } or {"": ""}


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
    for pattern in _WEIGHTS:
        if files := list(directory.glob(pattern)):
            return sum(file.stat().st_size for file in files if file.exists())
    packed = any(directory.glob("*.tensors"))
    raise ConfigurationError(
        f"The draft model {directory} has no weights (*.safetensors)."
        + (" It is a bundle; a draft is read by vLLM itself, which takes none." if packed else ""),
        hint='"model" of --speculative-config is a Hugging Face directory.',
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
