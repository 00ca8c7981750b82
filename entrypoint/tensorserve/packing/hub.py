"""Which directory does a model's name refer to: one on disk, or in the Hugging Face hub's cache?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tensorserve.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_URL = re.compile(r"([a-z][a-z0-9+.-]*):/", re.IGNORECASE)
# Neither pickles nor weights of other frameworks.
_DOWNLOADED = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.model.v*", "*.spm", "*.tiktoken"),
    *("*.jinja", "LICENSE*"),
)
_CODE = "*.py"


def model_directory(source: Path, *, code: bool = False) -> tuple[Path, str]:
    """(directory or file, the model's name) for SRC: a path, or ``organisation/model`` of the hub.

    The hub's cache is searched first (HF_HOME, HF_HUB_CACHE), then the hub itself, unless
    HF_HUB_OFFLINE is set. `code` downloads Python files as well. Raises ConfigurationError if the
    model is in neither.
    """
    if (url := _URL.match(str(source))) and not source.exists():
        raise ConfigurationError(
            f"SRC is a URL ({url[1]}:). A model is packed from a directory, or from the hub.",
            hint="Give organisation/model for a model of the hub; download any other one.",
        )
    if source.exists() or not _NAME.fullmatch(str(source)):
        directory = source if source.is_dir() else source.parent
        # The name as typed: the model may be named by a symbolic link to its directory.
        return source, Path(os.path.abspath(directory)).name  # noqa: PTH100 - resolve() follows links
    name = str(source)
    try:
        from httpx2 import HTTPError, InvalidURL
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )
    except ValueError as error:  # huggingface_hub parses HF_ENDPOINT when it is imported
        raise ConfigurationError(
            f"{name} cannot be looked up: HF_ENDPOINT is not a URL ({error}).",
            hint="Unset it, or set it to https://host.",
        ) from error
    try:
        try:
            found = snapshot_download(name, local_files_only=True)
            # The cache may have only some of the model's files, without its weights.
            whole = any(Path(found).glob("*.safetensors"))
        except LocalEntryNotFoundError:
            whole = False
        if not whole:
            found = snapshot_download(
                name, allow_patterns=[*_DOWNLOADED, *([_CODE] if code else [])]
            )
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HTTPError,
        InvalidURL,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{name} is not a directory, is not in the hub's cache, and could not be downloaded: "
            f"{reason}",
            hint="Give a directory, or set HF_HOME to the cache that has the model.",
        ) from error
    return Path(found), name
