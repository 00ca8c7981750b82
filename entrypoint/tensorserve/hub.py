"""Which directory does a model's name mean: one on disk, or one of the Hugging Face hub's cache?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tensorserve.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# No pickles, no other frameworks' weights, no code.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICENSE*")


def model_directory(source: Path) -> tuple[Path, str]:
    """(directory, the model's name) for SRC: a path, or ``organisation/model`` of the hub.

    The hub's cache is looked at first (HF_HOME, HF_HUB_CACHE), then the hub itself, unless
    HF_HUB_OFFLINE says not to. Raises ConfigurationError if it is in neither.
    """
    if source.exists() or not _NAME.fullmatch(str(source)):
        directory = source if source.is_dir() else source.parent
        # As it was typed: a link to it may be what names the model.
        return source, Path(os.path.abspath(directory)).name  # noqa: PTH100 - resolve() follows links
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name = str(source)
    try:
        try:
            found = snapshot_download(name, local_files_only=True)
            # A cache may have as little of a model as its tokenizer.
            whole = any(Path(found).glob("*.safetensors"))
        except LocalEntryNotFoundError:
            whole = False
        if not whole:
            found = snapshot_download(name, allow_patterns=list(_WANTED))
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"{name} is no directory, is not in the hub's cache, and could not be fetched: "
            f"{reason}",
            hint="Give a directory, or set HF_HOME to the cache that has the model.",
        ) from error
    return Path(found), name
